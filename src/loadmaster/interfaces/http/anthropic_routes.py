"""Anthropic's routes: messages, and how many tokens they are."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from loadmaster.interfaces.http.anthropic_writer import AnthropicWriter
from loadmaster.interfaces.http.bodies import read_json
from loadmaster.interfaces.http.generating import respond, serving_of
from loadmaster.interfaces.http.writing import json_response
from loadmaster.tasks.api.anthropic_requests import as_openai, chat_of
from loadmaster.tasks.api.chat_requests import ChatPrompt, parse_tool_chat


async def messages(request: Request) -> Response:
    """POST /v1/messages"""
    asked = parse_tool_chat(as_openai(await read_json(request)))
    prompt = ChatPrompt(asked)
    return await respond(request, asked, prompt.tokenize, AnthropicWriter(prompt.reader))


async def count_tokens(request: Request) -> Response:
    """POST /v1/messages/count_tokens"""
    asked = parse_tool_chat(chat_of(await read_json(request)))
    serving = serving_of(request)
    async with serving.use(asked.model) as model:
        (tokens,) = await serving.call(model, ChatPrompt(asked).tokenize)
    return json_response({"input_tokens": len(tokens)})


ROUTES = [
    Route("/v1/messages", messages, methods=["POST"]),
    Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
]
