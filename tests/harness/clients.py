"""What clients of a server of the trained checkpoint send, and what its reference answers."""

import torch

VERSE = "And it came to pass in those days, that"


def greedy(reference, token_ids: list[int], tokens: int) -> list[int]:
    prompt = torch.tensor([token_ids])
    # Without a mask of its own generate() would take a leading <|endoftext|> for padding.
    settings = dict(attention_mask=torch.ones_like(prompt), do_sample=False, eos_token_id=None, pad_token_id=0)
    output = reference.generate(prompt, max_new_tokens=tokens, **settings)
    return output[0, len(token_ids) :].tolist()


def complete(client, server, prompt, tokens: int, **settings):
    return client.completions.create(
        model=server.model,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
        **settings,
    )
