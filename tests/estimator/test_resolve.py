import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from estimator.errors import ConfigError, ModelNotFoundError
from estimator.inventory_codec import encode
from estimator.sources.cache import InventoryCache, content_hash, default_directory
from estimator.sources.process import Inspector
from estimator.sources.resolve import ModelSource, resolve

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "torch_dtype": "bfloat16",
}
# embedding and head, then per layer: four attention projections, three MLP matrices, two norms; the final norm
NUM_PARAMETERS = 2 * 100 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64


class CountingInspector(Inspector):
    """Counts how often the framework is asked."""

    def __init__(self, inner: Inspector) -> None:
        super().__init__(keep_spare=False)
        self.inner, self.num_calls = inner, 0

    def run(self, task: str, payload: Mapping[str, object], *, wall_seconds: float | None = None) -> Any:
        self.num_calls += 1
        return self.inner.run(task, payload, wall_seconds=wall_seconds)


@pytest.mark.parametrize("model", [CONFIG, {"config": CONFIG}])
def test_an_inline_config_is_built(model: dict[str, Any], inspector: Inspector) -> None:
    found = resolve(model, inspector=inspector, cache=InventoryCache(None))
    assert (found.source, found.id, found.inventory.num_parameters) == (ModelSource.CONFIG, None, NUM_PARAMETERS)
    assert found.inventory.checkpoint_dtype == "bfloat16"


def run(config: Mapping[str, Any]) -> None:
    """One forward pass of the real model."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    fields = {name: value for name, value in config.items() if name not in ("model_type", "architectures", "torch_dtype")}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(config["model_type"], **fields))
    model(input_ids=torch.zeros((1, 4), dtype=torch.long))


SMALL = {**{name: value for name, value in CONFIG.items() if name not in ("architectures", "num_attention_heads")}, "pad_token_id": 0}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("model_type", "heads", "accepted"),
    [
        ("llama", {"num_key_value_heads": 5}, "num_key_value_heads: 5 .*num_attention_heads .32"),  # of 32 by default
        ("mistral", {"num_attention_heads": 4, "intermediate_size": 96}, "num_key_value_heads: 8 .*num_attention_heads .4"),  # 8 by default
        ("gemma2", {"num_attention_heads": 8, "head_dim": 8, "num_key_value_heads": 3}, "num_key_value_heads: 3 .*num_attention_heads .8"),
        ("llama", {"num_attention_heads": 4, "head_dim": 0}, "head_dim: 0 .* from 1 to 131072, or none"),
        ("gemma2", {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 0}, "head_dim: 0 .* from 1 to 131072, or none"),
    ],
)
def test_heads_that_the_real_model_fails_on_are_refused(
    model_type: str, heads: dict[str, int], accepted: str, inspector: Inspector
) -> None:
    config = {**SMALL, "model_type": model_type, **heads}
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        run(config)
    with pytest.raises(ConfigError, match=rf"^model\.config\.{accepted}") as caught:
        resolve(config, inspector=inspector, cache=InventoryCache(None))
    assert [error.field for error in caught.value.errors] == [f"model.config.{accepted.partition(':')[0]}"]


@pytest.mark.parametrize("model_type", ["mistral", "mixtral", "starcoder2"])
def test_heads_of_no_width_have_the_usual_one_where_the_class_takes_0_for_none(model_type: str, inspector: Inspector) -> None:
    config = {**SMALL, "model_type": model_type, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    run({**config, "head_dim": 0})
    zero, without = (
        resolve(each, inspector=inspector, cache=InventoryCache(None)).inventory for each in ({**config, "head_dim": 0}, config)
    )
    assert zero.rows == without.rows
    assert zero.config["head_dim"] == 64 // 4


def test_a_file_and_its_folder_are_the_same_config(tmp_path: Path, inspector: Inspector) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    cache = InventoryCache(None)
    by_file = resolve(tmp_path / "config.json", inspector=inspector, cache=cache)
    assert resolve(tmp_path, inspector=inspector, cache=cache).inventory == by_file.inventory


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"expected a config\.json"):
        resolve(tmp_path / "config.json")


def test_own_code_is_not_run_where_the_class_is_known(inspector: Inspector) -> None:
    found = resolve({**CONFIG, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}, inspector=inspector, cache=InventoryCache(None))
    assert found.has_own_code
    assert found.inventory.num_parameters == NUM_PARAMETERS


def test_own_code_is_refused_where_the_class_is_not_known(inspector: Inspector) -> None:
    config = {**CONFIG, "model_type": "baichuan", "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"}}
    with pytest.raises(ConfigError, match=r"brings code of its own \(auto_map\), which is never run"):
        resolve(config, inspector=inspector, cache=InventoryCache(None))


def test_the_same_config_is_built_once_also_by_another_program(inspector: Inspector, tmp_path: Path) -> None:
    counting = CountingInspector(inspector)
    for cache in (InventoryCache(tmp_path), InventoryCache(tmp_path)):
        for _ in range(2):
            assert resolve(CONFIG, inspector=counting, cache=cache).inventory.num_parameters == NUM_PARAMETERS
    assert counting.num_calls == 1


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b'{"rows": 3}', b"\xff" * 100, b"[" * 10_000])
def test_a_damaged_file_is_rebuilt(damage: bytes, inspector: Inspector, tmp_path: Path) -> None:
    resolve(CONFIG, inspector=inspector, cache=InventoryCache(tmp_path))
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage)
    assert resolve(CONFIG, inspector=inspector, cache=InventoryCache(tmp_path)).inventory.num_parameters == NUM_PARAMETERS
    assert json.loads(file.read_bytes())["model_class"] == "LlamaForCausalLM"


def test_a_file_under_another_key_is_not_believed(inspector: Inspector, tmp_path: Path) -> None:
    inventory = resolve(CONFIG, inspector=inspector, cache=InventoryCache(None)).inventory
    other = tmp_path / f"{'a' * 64}.json"
    other.write_text(json.dumps(encode(inventory)))
    assert InventoryCache(tmp_path).get("a" * 64) is None
    assert not other.exists()


@pytest.mark.parametrize("key", ["../../etc/passwd", "", "A" * 64, "a" * 63])
def test_a_key_that_is_no_hash_reaches_no_file(key: str, tmp_path: Path) -> None:
    assert InventoryCache(tmp_path).get(key) is None


def test_a_folder_that_cannot_be_written_only_costs_the_cache(inspector: Inspector, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = InventoryCache(tmp_path / "file" / "below")
    assert resolve(CONFIG, inspector=inspector, cache=cache).inventory.num_parameters == NUM_PARAMETERS


def test_memory_and_disk_are_bounded(inspector: Inspector, tmp_path: Path) -> None:
    cache = InventoryCache(tmp_path, max_entries=2, max_files=3)
    for vocabulary in range(100, 106):
        resolve({**CONFIG, "vocab_size": vocabulary}, inspector=inspector, cache=cache)
    assert len(cache._entries) == 2
    assert len(list(tmp_path.iterdir())) == 3


def test_the_hash_tells_configs_and_versions_apart_and_ignores_order() -> None:
    versions = (("torch", "2.13.0"), ("transformers", "5.23.0"))
    assert content_hash(CONFIG, versions) == content_hash(dict(reversed(CONFIG.items())), versions)
    assert content_hash(CONFIG, versions) != content_hash({**CONFIG, "vocab_size": 101}, versions)
    assert content_hash(CONFIG, versions) != content_hash(CONFIG, (("torch", "2.13.0"), ("transformers", "5.24.0")))


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VRAMPLAN_CACHE_DIR", raising=False)
    assert default_directory() == tmp_path / "vramplan"
    monkeypatch.setenv("VRAMPLAN_CACHE_DIR", "/elsewhere")
    assert default_directory() == Path("/elsewhere")
