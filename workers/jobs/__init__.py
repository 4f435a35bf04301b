"""Jobs inside a worker: from the message Celery hands over to the stored result."""
