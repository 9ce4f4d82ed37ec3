"""Errors of the Hub's client."""

from huggingface_hub.errors import HfHubHTTPError


HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""HTTPError of httpx, or of httpx2 from huggingface_hub 2.4 on. A connection that breaks raises it too."""
