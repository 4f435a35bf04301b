"""The project's documents."""

from django.db import models


class Document(models.Model):
    """A text and, once it was embedded, its vector."""

    text = models.TextField()
    #: Of float32.
    vector = models.BinaryField(null=True)
