"""Talk to a running server (`make serve`) with the openai client; the answer streams.

The trained model answers a verse with a verse. Lines come from the terminal or from standard input.
An empty line ends the conversation.
"""

import argparse
import sys

from openai import APIConnectionError, APIError, OpenAI
from openai.types.chat import ChatCompletionMessageParam


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="default: the first that the server names")
    parser.add_argument("--temperature", type=float, help="default: the checkpoint's")
    parser.add_argument("--max-tokens", type=int, default=100)
    arguments = parser.parse_args()

    client = OpenAI(base_url=arguments.url, api_key="none")
    try:
        model = arguments.model or client.models.list().data[0].id
    except APIConnectionError:
        print(f"no server answers at {arguments.url}: start one with 'make serve' or give --url.", file=sys.stderr)
        return 2
    messages: list[ChatCompletionMessageParam] = []
    prompt = "you: " if sys.stdin.isatty() else ""
    while line := _line(prompt):
        messages.append({"role": "user", "content": line})
        answer = ""
        for event in client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            stream=True,
        ):
            piece = event.choices[0].delta.content or ""
            answer += piece
            print(piece, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": answer})
    return 0


def _line(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    try:
        sys.exit(main())
    except APIError as error:
        sys.exit(f"the server ended the conversation: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
