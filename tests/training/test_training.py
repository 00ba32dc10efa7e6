"""A run of two steps writes two checkpoints that transformers can read, and only formats that execute nothing."""

import json
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from training.distil import Answer, distil  # noqa: E402
from training.train import DEFAULT_OUT, DRAFT_NAME, MAIN_NAME, Budget, Plan, run  # noqa: E402


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundled")
    outcomes = run(Plan(out=out, quick=True))
    assert set(outcomes) == {MAIN_NAME, DRAFT_NAME}
    assert all(o.steps == 2 and math.isfinite(o.held_out_loss) for o in outcomes.values())
    return out


@pytest.mark.parametrize("name", [MAIN_NAME, DRAFT_NAME])
def test_checkpoint_is_complete_and_readable(trained: Path, name: str) -> None:
    files = {path.name for path in (trained / name).iterdir()}
    assert files == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(trained / name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / name)
    assert model.config.vocab_size == len(tokenizer) == 2048
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|eos|>", "<|end|>"])
    ids = tokenizer("Once upon a time")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()


def test_a_draft_model_is_taught_what_the_main_model_would_say(trained: Path) -> None:
    main, draft = (
        transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (DEFAULT_OUT / MAIN_NAME, trained / DRAFT_NAME)
    )
    ids = torch.randint(10, 2000, (32, 40), generator=torch.Generator().manual_seed(1))
    made = [Answer(row.tolist(), 8) for row in ids]

    def distance() -> float:
        with torch.no_grad():
            target, guess = (model(ids).logits.log_softmax(-1) for model in (main, draft))
        return float(torch.nn.functional.kl_div(guess, target, log_target=True, reduction="batchmean"))

    before = distance()
    assert distil(main, draft, made, Budget(steps=8, seconds=60.0, peak_lr=4e-3), seed=1) == 8
    assert distance() < before


def test_both_models_share_one_tokenizer(trained: Path) -> None:
    main, draft = (json.loads((trained / name / "tokenizer.json").read_text()) for name in (MAIN_NAME, DRAFT_NAME))
    assert main == draft


def test_rate_warms_up_holds_and_decays_to_zero() -> None:
    budget = Budget(steps=100, seconds=100.0)
    rates = [budget.rate(step / 100) for step in range(101)]
    assert rates[0] < rates[2] == budget.peak_lr == rates[50] == max(rates)
    assert rates[100] == 0.0
    assert rates[65:] == sorted(rates[65:], reverse=True)


def test_budget_ends_with_time_or_steps_whichever_is_first() -> None:
    budget = Budget(steps=10, seconds=100.0)
    assert budget.progress(step=5, elapsed_s=80.0) == 0.8
    assert budget.progress(step=10, elapsed_s=0.0) == 1.0
