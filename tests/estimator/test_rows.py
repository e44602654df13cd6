from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.dtypes import DType
from estimator.inventory import ModuleKind, TensorRole
from estimator.inventory_codec import decode_indices, decode_row, encode_indices, encode_row
from estimator.rows import Tensor, group, products, split_name


def tensor(name: str, shape: tuple[int, ...] = (2, 3)) -> Tensor:
    return Tensor(
        name=name,
        shape=shape,
        dtype=DType.FLOAT32,
        role=TensorRole.PARAMETER,
        module_kind=ModuleKind.LINEAR,
        module_class="Linear",
        tied_to=None,
        dtype_is_fixed=False,
    )


def test_numbers_in_a_name_become_places_of_a_pattern() -> None:
    assert split_name("model.layers.3.experts.11.w1.weight") == ("model.layers.{}.experts.{}.w1.weight", (3, 11))


def test_numbers_within_a_word_stay() -> None:
    assert split_name("model.layers.3.conv1d.weight") == ("model.layers.{}.conv1d.weight", (3,))


def test_tensors_of_one_shape_form_one_row_in_order_of_the_first() -> None:
    rows = group([tensor("a.weight"), *(tensor(f"l.{i}.x.weight") for i in range(3)), *(tensor(f"l.{i}.y.weight") for i in range(3))])
    assert [(row.pattern, row.num_copies) for row in rows] == [("a.weight", 1), ("l.{}.x.weight", 3), ("l.{}.y.weight", 3)]
    assert list(rows[1].names()) == ["l.0.x.weight", "l.1.x.weight", "l.2.x.weight"]


def test_layers_of_other_shapes_form_rows_of_their_own() -> None:
    rows = group([tensor("l.0.w", (2,)), tensor("l.1.w", (4,)), tensor("l.2.w", (2,))])
    assert [(row.indices, row.shape) for row in rows] == [(((0, 2),), (2,)), (((1,),), (4,))]


def test_indices_that_are_no_product_are_split() -> None:
    assert products([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]) == [((0, 1), (0, 1)), ((2,), (0,))]


@given(st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2)), min_size=1))
def test_products_cover_every_index_exactly_once(indices: set[tuple[int, ...]]) -> None:
    covered = [numbers for factors in products(sorted(indices)) for numbers in product(*factors)]
    assert sorted(covered) == sorted(indices)


@given(st.lists(st.sets(st.integers(0, 200), min_size=1).map(lambda s: tuple(sorted(s)))))
def test_indices_survive_encoding(indices: list[tuple[int, ...]]) -> None:
    assert decode_indices(encode_indices(indices)) == tuple(indices)


def test_runs_of_indices_are_written_short() -> None:
    assert encode_indices(((0, 1, 2, 5), (7,))) == "0-2,5;7"


def test_a_braced_key_survives_naming() -> None:
    (row,) = group([tensor("adapters.{x}.0.weight")])
    assert list(row.names()) == ["adapters.{x}.0.weight"]


@pytest.mark.parametrize("values", [[], ["w", "0-x"], ["w", "", "no shape"], ["w", "", [2], "Linear", "no kind"], [1]])
def test_what_is_no_row_is_refused(values: list[object]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        decode_row(values)


def test_a_row_survives_encoding_without_its_defaults() -> None:
    (row,) = group([tensor("model.norm.weight", (8,))])
    assert encode_row(row) == ["model.norm.weight", "", [8], "Linear", "linear"]
    assert decode_row(encode_row(row)) == row
