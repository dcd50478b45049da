"""OpenAI's own client, unmodified, of a server that runs."""

from openai import OpenAI

from tests.serve_parts import Running


def openai_client(server: Running) -> OpenAI:
    """It asks once. To be closed."""
    return OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
