"""Versions never change, whichever is read or written, in whatever order."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from aidx.cache.persistent import PersistentArray, PersistentMap

SIZE = 6
# (which version to start from, slice or indices, values)
changes = st.lists(
    st.tuples(
        st.integers(0, 10**6),
        st.booleans(),
        st.lists(st.integers(0, SIZE - 1), unique=True),
        st.integers(1, 99),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(changes)
def test_every_version_of_an_array_keeps_its_entries(steps):
    versions = [PersistentArray(np.zeros(SIZE, np.int32))]
    models = [np.zeros(SIZE, np.int32)]
    for pick, sliced, index, value in steps:
        base = pick % len(versions)
        where = slice(min(index), max(index) + 1) if sliced and index else np.array(index, int)
        model = models[base].copy()
        model[where] = value
        versions.append(versions[base].set(where, value))
        models.append(model)
        probe = (pick // 7) % len(versions)
        assert versions[probe].to_numpy().tolist() == models[probe].tolist()
    for version, model in zip(versions, models, strict=True):
        assert version.to_numpy().tolist() == model.tolist()


@settings(deadline=None)
@given(changes)
def test_every_version_of_a_map_keeps_its_entries(steps):
    versions, models = [PersistentMap({})], [{}]
    for pick, delete, keys, value in steps:
        base = pick % len(versions)
        model = dict(models[base])
        if delete:
            for key in keys:
                model.pop(key, None)
            versions.append(versions[base].delete(keys))
        else:
            model.update(dict.fromkeys(keys, value))
            versions.append(versions[base].update(dict.fromkeys(keys, value)))
        models.append(model)
        probe = (pick // 7) % len(versions)
        assert versions[probe].to_dict() == models[probe]
    for version, model in zip(versions, models, strict=True):
        assert version.to_dict() == model
        assert version.get_all([0, 1]) == [model.get(0), model.get(1)]


def test_entries_handed_out_are_copies():
    array = PersistentArray(np.arange(4))
    array[0:2][:] = 9
    array.to_numpy()[:] = 9
    assert array.to_numpy().tolist() == [0, 1, 2, 3]


def test_an_old_version_does_not_hold_on_to_every_change_since():
    first = PersistentArray(np.zeros(8, np.int32))
    newest = first
    for step in range(1000):
        newest = newest.set(np.array([step % 8]), step)
    length, node = 0, first
    while node._change is not None:
        node, length = node._base, length + 1
    assert length <= 8 + 64
    assert first.to_numpy().tolist() == [0] * 8
