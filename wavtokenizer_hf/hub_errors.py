"""Errors of huggingface_hub."""

from huggingface_hub.errors import HfHubHTTPError


HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""HTTPError of httpx, or of httpx2 since huggingface_hub 2.4. Broken connections raise it too."""
