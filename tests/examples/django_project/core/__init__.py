"""Documents and the search in them."""
