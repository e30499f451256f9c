"""A schema names every distinct trainable tensor, and says in one line how two models differ."""

import contextlib
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors.models import Awkward

from hetero_async.errors import PeerError, SchemaError
from hetero_async.tensors.schema import SCHEMA_BYTES_MAX, Schema, TensorSpec, difference, schema_of


def of(*aliases: tuple[str, str], **shapes: tuple[int, ...]) -> Schema:
    tensors = tuple(TensorSpec(name=name, shape=shape) for name, shape in shapes.items())
    return Schema(tensors=tensors, aliases=aliases)


def test_it_holds_each_distinct_trainable_tensor_once_in_the_models_order() -> None:
    schema = schema_of(Awkward())
    assert {tensor.name: tensor.shape for tensor in schema.tensors} == {
        "temperature": (),
        "nothing": (0, 3),
        "embedding.weight": (11, 6),
        "norm.weight": (6,),
        "norm.bias": (6,),
    }
    assert schema.aliases == (("head.weight", "embedding.weight"),)
    assert schema.numel == 1 + 0 + 66 + 6 + 6


def test_it_comes_back_from_its_bytes() -> None:
    schema = schema_of(Awkward())
    again = Schema.from_bytes(schema.to_bytes())
    assert again == schema
    assert again.hash == schema.hash
    assert len(schema.hash) == 16


def test_workers_of_different_dtypes_have_the_same_schema() -> None:
    hashes = {schema_of(Awkward().to(kind)).hash for kind in (torch.float32, torch.bfloat16, torch.float64)}
    assert len(hashes) == 1


def test_names_shapes_and_ties_change_the_hash() -> None:
    untied = Awkward()
    untied.head.weight = torch.nn.Parameter(untied.head.weight.detach().clone())
    schemas = [schema_of(Awkward()), schema_of(untied), of(a=(2, 3)), of(a=(3, 2)), of(b=(2, 3))]
    assert len({schema.hash for schema in schemas}) == len(schemas)


def test_constants_do_not_change_the_hash() -> None:
    model = Awkward()
    model.norm.running_mean = torch.full((6,), 3.0)
    assert schema_of(model).hash == schema_of(Awkward()).hash


def test_a_complex_parameter_is_refused_by_name_and_dtype() -> None:
    model = torch.nn.Linear(2, 2)
    model.phase = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(SchemaError, match=r"phase is torch\.complex64"):
        schema_of(model)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(SchemaError, match="no parameter"):
        schema_of(torch.nn.ReLU())


def test_a_parameter_without_a_shape_yet_is_refused() -> None:
    with pytest.raises(SchemaError, match="weight has no shape yet"):
        schema_of(torch.nn.LazyLinear(3))


@pytest.mark.parametrize(
    ("expected", "found", "words"),
    [
        (of(a=(2,), b=(3,)), of(a=(2,)), "tensor b [3] is expected and is missing"),
        (of(a=(2,)), of(a=(2,), b=(3,)), "tensor b [3] is not expected"),
        (of(a=(2, 3)), of(a=(3, 2)), "tensor a: expected [2, 3], found [3, 2]"),
        (of(a=(2,), b=(3,)), of(a=(9,), b=(9,)), "tensor a: expected [2], found [9]"),
        (of(a=(2,), b=(3,)), of(b=(3,), a=(2,)), "another order: expected a, found b in its place"),
        (of(("c", "a"), a=(2,), b=(2,)), of(("c", "b"), a=(2,), b=(2,)), "c: expected tied to a, found tied to b"),
        (of(("c", "a"), a=(2,)), of(a=(2,)), "tensor c: expected tied to a, found absent"),
        (of(a=(2,)), of(("c", "a"), a=(2,)), "tensor c: expected absent, found tied to a"),
        (
            of(("c", "a"), ("d", "a"), a=(2,)),
            of(("d", "a"), ("c", "a"), a=(2,)),
            "order: expected c, found d in its place",
        ),
    ],
)
def test_a_difference_is_one_line_that_names_the_first_tensor(expected: Schema, found: Schema, words: str) -> None:
    line = difference(expected, found)
    assert words in line
    assert "\n" not in line


def test_equal_schemas_do_not_differ() -> None:
    assert difference(schema_of(Awkward()), schema_of(Awkward())) == ""


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"\xff",
        b"null",
        b"[]",
        b"[" * 100_000,
        b'{"tensors":[],"aliases":[] }',
        b'{"tensors":[["a",[-1]]],"aliases":[]}',
        b'{"tensors":[["a",[1.0]]],"aliases":[]}',
        b'{"tensors":[["a",[true]]],"aliases":[]}',
        b'{"tensors":[["a",[281474976710656]]],"aliases":[]}',
        b'{"tensors":[[1,[1]]],"aliases":[]}',
        b'{"tensors":[["a",1]],"aliases":[]}',
        b'{"tensors":[["a",[1]],["a",[1]]],"aliases":[]}',
        b'{"tensors":[["a",[1]]],"aliases":[["a","a"]]}',
        b'{"tensors":[["a",[1]]],"aliases":[["b","c"]]}',
        b'{"tensors":[["\\ud800",[1]]],"aliases":[]}',
        b" " * (SCHEMA_BYTES_MAX + 1),
    ],
    ids=lambda junk: repr(junk[:40]),
)
def test_junk_is_refused(junk: bytes) -> None:
    with pytest.raises(PeerError):
        Schema.from_bytes(junk)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["tensors", "aliases"]), inner),
)


@given(JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60))
def test_whatever_comes_is_a_schema_or_a_peers_fault(data: bytes) -> None:
    with contextlib.suppress(PeerError):
        assert Schema.from_bytes(data).to_bytes() == data
