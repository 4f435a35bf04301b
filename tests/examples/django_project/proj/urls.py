"""Addresses of the project."""

from django.urls import path

from core import views

urlpatterns = [path("add", views.add), path("search", views.search)]
