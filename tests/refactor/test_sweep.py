"""Streams through a model layer by layer: every layer once, going on in the middle, shards."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from prism.loading import load_model
from prism.streaming import StreamedModel
from prism_refactor.cut import Cutter
from prism_refactor.errors import Reason, RefactorError
from prism_refactor.layer_experts import full_output
from prism_refactor.sweep import Answer, plain, sweep
from torch import Tensor

IDS = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))


class Kept:
    """States in memory."""

    def __init__(self, at: tuple[int, dict[str, Tensor]] | None = None) -> None:
        self.at = at
        self.all: dict[int, dict[str, Tensor]] = {}

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        return self.at

    def save(self, done: int, hidden: dict[str, Tensor]) -> None:
        self.all[done] = {name: state.clone() for name, state in hidden.items()}


@pytest.fixture
def model(checkpoint: Path) -> StreamedModel:
    return StreamedModel(checkpoint, torch.float32)


def both(number: int, module: Any) -> Mapping[str, Answer]:
    return {"ours": lambda x, i, w: full_output(module, x, i, w), "plain": plain(module)}


def test_two_streams_pass_every_layer_and_are_the_models(
    model: StreamedModel, checkpoint: Path
) -> None:
    kept, passed = Kept(), []
    batch = model.batch(IDS)
    hidden = sweep(model, {"ours": batch, "plain": batch}, both, kept, passed=passed.append)
    whole, _ = load_model(checkpoint, torch.float32)
    with torch.inference_mode():
        expected = whole(IDS).logits
    torch.testing.assert_close(model.logits(IDS, hidden["ours"]), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.logits(IDS, hidden["plain"]), expected, atol=1e-5, rtol=0)
    assert passed == [0, 1]


def test_resuming_skips_finished_layers_and_gives_the_same(model: StreamedModel) -> None:
    batches = dict.fromkeys(("ours", "plain"), model.batch(IDS))
    first, asked = Kept(), []

    def counting(number: int, module: Any) -> Mapping[str, Answer]:
        asked.append(number)
        return both(number, module)

    hidden = sweep(model, batches, counting, first)
    again = sweep(model, batches, counting, Kept((1, first.all[1])))
    assert asked == [0, 1, 1]
    assert torch.equal(again["ours"], hidden["ours"])


def cuts_of(
    model: StreamedModel, change: Callable[[int, Any, Any], None] = lambda *_: None
) -> dict[int, Any]:
    """Cuts of all layers; ``change`` (layer, decoder layer, experts) before each."""
    found: dict[int, Any] = {}
    cutter = Cutter(sub_experts=4, seed=0, workers=2)

    def answers(number: int, module: Any) -> Mapping[str, Answer]:
        change(number, model.layers[number], module)

        def answer(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            found[number] = cutter.fit(number, module, x, index, weights)
            return full_output(module, x, index, weights)

        return {"full": answer}

    try:
        sweep(model, {"full": model.batch(IDS)}, answers, Kept())
    except RefactorError as error:
        error.add_note(str(sorted(found)))
        raise
    return found


def test_an_expert_that_no_token_reaches_still_gets_a_sub_router(model: StreamedModel) -> None:
    """The random router sends tokens everywhere; shut one expert out and fit."""

    def shut_out(number: int, layer: Any, module: Any) -> None:
        layer.mlp.gate.weight[2] = -layer.mlp.gate.weight[[0, 1, 3, 4, 5]].sum(0) * 10

    for cut in cuts_of(model, shut_out).values():
        assert torch.isfinite(cut.router_weight).all()
        assert cut.router_weight[2].any()
        assert torch.equal(cut.permutations[2].sort()[0], torch.arange(48, dtype=torch.int32))
        assert cut.usage.sum() == pytest.approx(2.0)


def test_weights_that_are_not_finite_are_named(model: StreamedModel) -> None:
    def spoil(number: int, layer: Any, module: Any) -> None:
        if number == 1:
            module.down_proj[3, 0, 0] = float("nan")

    with pytest.raises(RefactorError, match="Expert 3 of MoE layer 1: ") as caught:
        cuts_of(model, spoil)
    assert caught.value.reason is Reason.CORRUPT_CHECKPOINT
    assert caught.value.__notes__ == ["[0]"]
