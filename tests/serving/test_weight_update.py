"""New weights in a running engine, in parts: the tokens of the reference that has them, and a way back after a refusal.

Without a transfer engine parts go to `load_weights`, as TRL's and OpenRLHF's workers do it; with one they go through
vLLM's start, update and finish.
"""

import random
import re

import pytest
import torch
from harness import file_transfer, tiny
from harness.engines import generate, model_runner
from harness.oracle import agrees, check
from harness.quantized import FORMATS
from harness.sleep import drop_weights, lost_tensors
from safetensors.torch import load_file, save_file
from vllm import SamplingParams

from vllm_yocou.reference import YocoUForCausalLM

PROMPTS = [tiny.prompt(length) for length in (1, 40)]
FUSED = "model.self_decoder.layers.1.self_attn.{}_proj.weight"


class Engine:
    """One that serves the weights of seed 0, and a checkpoint of seed 1 beside it."""

    def __init__(self, start, folder, config, write=None, **settings):
        self.folders = [folder / "old", folder / "new"]
        self.models = []
        for seed, it in enumerate(self.folders):
            it.mkdir()
            model = tiny.model(config, seed)
            written = write and write(model, it)
            if write is None:
                model.save_pretrained(it)
            self.models.append(written or model)
        self.llm = start(self.folders[0], kv_cache_memory_bytes=16 << 20, **file_transfer.SETTINGS, **settings)
        self.model = model_runner(self.llm).model

    def tensors(self, seed: int) -> dict[str, torch.Tensor]:
        return load_file(self.folders[seed] / "model.safetensors")

    def reload(self, seed: int) -> None:
        self.call("reload_weights", weights_path=str(self.folders[seed]))

    def call(self, method: str, **arguments) -> None:
        self.llm.collective_rpc(method, kwargs=arguments)

    def update(self, names: list[str], file=None) -> None:
        self.call(
            "update_weights", update_info={"file": str(file or self.folders[1] / "model.safetensors"), "names": names}
        )

    def answers(self) -> list:
        self.llm.reset_prefix_cache()
        return generate(self.llm, PROMPTS)

    def serves(self, model) -> None:
        agrees(model, PROMPTS, self.answers())

    def mixed(self, names) -> YocoUForCausalLM:
        """The reference of the old weights with the new ones of these names."""
        model = tiny.model(self.models[0].config)
        model.load_state_dict({name: tensor for name, tensor in self.tensors(1).items() if name in names}, strict=False)
        return model


@pytest.fixture(scope="module")
def shared(module_engine, tmp_path_factory):
    return Engine(module_engine, tmp_path_factory.mktemp("weights"), tiny.config(qk_norm="all"))


@pytest.fixture
def engine_of_old(shared):
    shared.reload(0)
    return shared


def send(engine: Engine, tensors: dict[str, torch.Tensor], size: int, order: random.Random | None = None) -> set[str]:
    """Buckets of `size` tensors in memory that is used again for the next one; the names that were returned."""
    pairs, returned = list(tensors.items()), set()
    if order:
        order.shuffle(pairs)
    for start in range(0, len(pairs), size):
        bucket = [(name, tensor.clone()) for name, tensor in pairs[start : start + size]]
        returned |= engine.model.load_weights(bucket)
        for _, tensor in bucket:
            tensor.fill_(float("nan") if tensor.is_floating_point() and tensor.itemsize > 1 else 0)
    return returned


@pytest.mark.parametrize("size, shuffled", [(1, True), (10, False)])
def test_parts_give_the_tokens_of_a_full_load(engine_of_old, size, shuffled):
    returned = send(engine_of_old, engine_of_old.tensors(1), size, random.Random(0) if shuffled else None)
    assert returned == set(dict(engine_of_old.model.named_parameters()))
    engine_of_old.serves(engine_of_old.models[1])


def test_vllms_weight_transfer(engine_of_old):
    names = list(engine_of_old.tensors(1))
    engine_of_old.call("start_weight_update")
    for start in range(0, len(names), 10):
        engine_of_old.update(names[start : start + 10])
    engine_of_old.call("finish_weight_update")
    engine_of_old.serves(engine_of_old.models[1])


def test_weights_come_back_after_sleep_level_2(engine_of_old):
    """It leaves what the memory happens to hold; a CPU has no sleep, but the same loads. Further models are below."""
    drop_weights(engine_of_old.model)
    engine_of_old.call("reload_weights")
    engine_of_old.serves(engine_of_old.models[0])
    drop_weights(engine_of_old.model)
    send(engine_of_old, engine_of_old.tensors(1), 10)
    engine_of_old.serves(engine_of_old.models[1])


def test_weights_that_change_mid_generation(engine_of_old):
    """The caches of the tokens before the change stay, as with a full load at the same step."""

    def answer(change) -> list[dict[int, float]]:
        engine_of_old.reload(0)
        engine_of_old.llm.reset_prefix_cache()
        engine, rows = engine_of_old.llm.llm_engine, []
        parameters = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=5, detokenize=False)
        engine.add_request("0", {"prompt_token_ids": PROMPTS[1]}, parameters)
        for step in range(30):
            if step == 8:
                change()
            for output in engine.step():
                rows = output.outputs[0].logprobs
        assert len(rows) == 16
        return [{token: entry.logprob for token, entry in row.items()} for row in rows]

    def transfer() -> None:
        engine_of_old.call("start_weight_update")
        for name in engine_of_old.tensors(1):
            engine_of_old.update([name])
        engine_of_old.call("finish_weight_update")

    full = answer(lambda: engine_of_old.reload(1))
    assert answer(transfer) == full
    assert answer(lambda: send(engine_of_old, engine_of_old.tensors(1), 10)) == full
    assert answer(lambda: None)[:5] == full[:5]
    assert answer(lambda: None) != full


def wrong_parts(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[dict[str, torch.Tensor], str]]:
    """A bad tensor, and what is said of it; each comes after a good one of the same part."""
    norm = tensors["model.norm.weight"]
    return {
        "name": ({"norm.weight": norm}, "do not fit the served model, unexpected: norm.weight. Nothing of this part"),
        "shape": ({"model.norm.weight": norm[:5]}, "misshapen: model.norm.weight is [5] instead of [96]."),
        "type": ({"model.norm.weight": norm.int()}, "model.norm.weight is of torch.int32 instead of a floating-point"),
        "NaN": ({"model.norm.weight": norm * torch.nan}, "sent hold NaN or infinity in model.norm.weight: nothing of"),
    }


@pytest.mark.parametrize("wrong", ["name", "shape", "type", "NaN"])
@pytest.mark.parametrize("way", ["load_weights", "transfer"])
def test_a_refused_part_changes_nothing(engine_of_old, tmp_path, way, wrong):
    """What came before it stays; the part sent right, and the rest, complete the update."""
    tensors = engine_of_old.tensors(1)
    sent = [name for name in tensors if "cross_decoder" in name]  # whole layers
    bad, sentence = wrong_parts(tensors)[wrong]
    good = {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"]}
    rest = [name for name in tensors if name not in sent]
    if way == "load_weights":
        engine_of_old.model.load_weights([(name, tensors[name]) for name in sent])
        with pytest.raises(ValueError, match=re.escape(sentence)) as refused:
            engine_of_old.model.load_weights(list((good | bad).items()))
    else:
        save_file({name: tensor.contiguous() for name, tensor in (good | bad).items()}, tmp_path / "part")
        engine_of_old.call("start_weight_update")
        engine_of_old.update(sent)
        with pytest.raises(ValueError, match=re.escape(sentence)) as refused:
            engine_of_old.update(list(good | bad), tmp_path / "part")
    assert "\n" not in str(refused.value)
    engine_of_old.serves(engine_of_old.mixed(sent))
    if way == "load_weights":
        engine_of_old.model.load_weights([(name, tensors[name]) for name in rest])
    else:
        engine_of_old.call("start_weight_update")  # vLLM ends an update that has met an error
        engine_of_old.update(rest)
        engine_of_old.call("finish_weight_update")
    engine_of_old.serves(engine_of_old.models[1])


def test_a_tensor_of_a_fused_matrix_waits_for_the_others(engine_of_old, lines):
    """vLLM would serve whatever the memory holds for keys and values."""
    q, k, v = (FUSED.format(part) for part in "qkv")
    tensors = engine_of_old.tensors(1)
    engine_of_old.call("start_weight_update")
    engine_of_old.update([q])
    engine_of_old.call("finish_weight_update")
    engine_of_old.serves(engine_of_old.models[0])
    assert lines == []
    engine_of_old.model.load_weights([(q, tensors[q])])
    engine_of_old.call("reload_weights", weights_iterator=iter([(q, tensors[q])]))
    sentence = f"New weights wait for {k}, {v}: a fused matrix and experts are served anew once all their tensors"
    assert len(lines) == 3 and all(line.startswith(sentence) for line in lines)
    assert engine_of_old.model.load_weights([(v, tensors[v])]) == {FUSED.format("qkv")}
    engine_of_old.serves(engine_of_old.models[0])
    assert engine_of_old.model.load_weights([(k, tensors[k])]) == {FUSED.format("qkv")}
    engine_of_old.serves(engine_of_old.mixed([q, k, v]))


def test_a_reload_that_is_refused_or_ends_half_way_changes_nothing(engine_of_old, tmp_path):
    tensors = engine_of_old.tensors(1)

    def interrupted():
        yield from list(tensors.items())[:13]
        raise OSError("the trainer has gone")

    with pytest.raises(OSError, match="the trainer has gone"):
        engine_of_old.call("reload_weights", weights_iterator=interrupted())
    engine_of_old.serves(engine_of_old.models[0])
    # The last tensor by name.
    bad = tensors | {"model.self_decoder.layers.1.self_attn.v_proj.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"misshapen: model\.self_decoder\.layers\.1\.self_attn\.v_proj\.weight is"):
        engine_of_old.call("reload_weights", weights_iterator=iter(bad.items()))
    engine_of_old.serves(engine_of_old.models[0])
    engine_of_old.reload(1)
    engine_of_old.serves(engine_of_old.models[1])


def with_stored_head(model, folder) -> None:
    """As some writers do it: vLLM builds two matrices, and ties them once it has seen that they are the same."""
    model.save_pretrained(folder)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")


KINDS = {
    "moe-tied": dict(config=tiny.moe_config(shared_expert_gate=True, tie_word_embeddings=True)),
    "tied-with-stored-head": dict(config=tiny.config(tie_word_embeddings=True), write=with_stored_head),
    "moe-without-shared": dict(config=tiny.moe_config(shared_expert_intermediate_size=None)),
    "random-start": dict(config=tiny.config(), load_format="dummy"),
    "with-adapters": dict(config=tiny.config(qk_norm="all"), enable_lora=True, max_lora_rank=8),
    "moe-v3-latent": dict(config=tiny.AUTHORS["moe-v3-latent"]),
    "attention-bias": dict(config=tiny.AUTHORS["attention-bias"]),
}


@pytest.mark.parametrize("kind", [pytest.param(it, marks=() if it == "moe-tied" else pytest.mark.slow) for it in KINDS])
def test_kinds_of_models(engine, tmp_path, kind):
    """With and without the copy of a tied head that a trainer's state_dict has and its named_parameters have not."""
    served = Engine(engine, tmp_path, **KINDS[kind])
    assert not lost_tensors(served.model)
    old, new = (dict(model.named_parameters()) for model in served.models)
    old, new = ({name: tensor.detach() for name, tensor in tensors.items()} for tensors in (old, new))
    returned = send(served, new, 7)
    assert returned == {name.replace(".base_layer", "") for name in dict(served.model.named_parameters())}
    served.serves(served.models[1])
    served.call("start_weight_update")
    send(served, dict(served.models[0].state_dict()), 10)
    served.call("finish_weight_update")
    served.serves(served.models[0])
    served.call("start_weight_update")
    served.model.load_weights(list(new.items())[:3])
    with pytest.raises(ValueError, match="unexpected: other"):
        served.model.load_weights([("other", torch.zeros(1))])
    send(served, new, 10)
    served.serves(served.models[1])
    assert not lost_tensors(served.model)
    drop_weights(served.model)
    if kind == "random-start":
        send(served, old, 10)
    else:
        served.reload(0)
    served.serves(served.models[0])


@pytest.mark.parametrize(
    "name", [pytest.param(it, marks=() if it == "compressed-tensors-w8a8" else pytest.mark.slow) for it in FORMATS]
)
def test_quantized_checkpoints(engine, tmp_path, name):
    """An engine over the other checkpoint would give the same; here the old one comes back through the new one."""
    quantized = FORMATS[name]
    config = tiny.config(qk_norm="all", **quantized.sizes)

    def write(model, folder):
        return quantized.save(model, folder)

    def rows(outputs) -> list:
        return [
            {token: entry.logprob for token, entry in row.items()} for it in outputs for row in it.outputs[0].logprobs
        ]

    served = Engine(engine, tmp_path, config, write, dtype=quantized.dtype)
    first = rows(served.answers())
    served.reload(1)
    full = rows(served.answers())
    assert full != first
    drop_weights(served.model)  # as sleep level 2
    served.reload(0)
    assert rows(served.answers()) == first
    send(served, served.tensors(1), 1)
    assert rows(served.answers()) == full
    scales = next(key for key in served.tensors(0) if key.endswith("scale") or key.endswith("scales"))
    served.call("start_weight_update")
    with pytest.raises(ValueError, match=f"misshapen: {re.escape(scales)} is"):
        served.model.load_weights([(scales, torch.zeros(1, 2, 3))])
    assert rows(served.answers()) == full
    matrix = next(
        key for key, tensor in served.tensors(0).items() if not tensor.is_floating_point() or tensor.itemsize == 1
    )
    with pytest.raises(ValueError, match=f"{re.escape(matrix)} is of torch.float32 instead of torch"):
        served.model.load_weights([(matrix, served.tensors(0)[matrix].float())])
    served.call("finish_weight_update")
    served.call("start_weight_update")
    send(served, served.tensors(0), 10)
    served.call("finish_weight_update")
    assert rows(served.answers()) == first


def test_a_quantized_checkpoint_behind_a_random_start_is_refused(engine, nightly, tmp_path):
    quantized = FORMATS["gptq"]
    served = Engine(engine, tmp_path, tiny.config(), quantized.save, dtype=quantized.dtype, load_format="dummy")
    with pytest.raises(ValueError, match=r"--load-format dummy over a quantized checkpoint.*, start it without"):
        send(served, served.tensors(1), 1)


@pytest.mark.parametrize("engine_process, repeated", [("two-ranks", 1), ("v2", 0)], indirect=["engine_process"])
def test_ranks_and_the_other_runner(engine_process, repeated, nightly, tmp_path):
    """A call that fails leaves the second rank's answer with vLLM, whose next call repeats it."""
    config = tiny.config(tie_word_embeddings=True)
    old, new = (tiny.model(config, seed) for seed in range(2))
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new")
    file = str(tmp_path / "new" / "model.safetensors")
    names = list(load_file(file))
    save_file({"model.norm.weight": torch.zeros(5)}, tmp_path / "bad")
    requests = [{"prompt": prompt} for prompt in PROMPTS]
    bad = {"file": str(tmp_path / "bad"), "names": ["model.norm.weight"]}
    back = ["reload_weights", {"weights_path": str(tmp_path / "old")}]
    parts = [{"file": file, "names": names[at : at + 10]} for at in range(0, len(names), 10)]
    start, finish = ["start_weight_update", {}], ["finish_weight_update", {}]
    batches = engine_process.run(
        tmp_path / "old",
        [requests] * 4,
        calls=[
            [start, ["update_weights", {"update_info": bad}]],
            [start, *(["update_weights", {"update_info": part}] for part in parts), finish],
            [back, ["receive_part", bad]],
            [["receive_part", part] for part in parts],
        ],
        worker_extension_cls="harness.file_transfer.PartReceiver",
        enable_prefix_caching=False,
        **file_transfer.SETTINGS,
    )
    for model, batch, refused in zip([old, new] * 2, batches, [1, repeated] * 2, strict=True):
        assert len(batch.refusals) == refused
        assert all("misshapen: model.norm.weight is [5] instead of [96]" in sentence for sentence in batch.refusals)
        check(model, requests, batch.outputs)
