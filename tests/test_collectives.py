"""The reader of optimised HLO: which transfers there are, how often, and what is gathered at once."""

import pytest

from bvl.train.collectives import ArrayType, Program

TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4,2]{1,0})->f32[]}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (state: (s32[], f32[3,4,2], /*index=2*/bf16[2])) -> (s32[], f32[3,4,2], bf16[2]) {
  %state = (s32[], f32[3,4,2]{2,1,0}, /*index=2*/bf16[2]{0}) parameter(0)
  %slice = f32[4,2]{1,0} get-tuple-element(%state), index=1
  %first = f32[4,16]{1,0} all-gather(%slice), channel_id=1, replica_groups=[1,8]<=[8], dimensions={1}
  %turned = f32[16,4]{0,1} transpose(%first), dimensions={1,0}
  %view = f32[64]{0} bitcast(%turned)
  %product = f32[5]{0} fusion(%view), kind=kLoop, calls=%fused
  %second = f32[4,16]{1,0} all-gather(%slice), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={1}
  %used = f32[5]{0} fusion(%second, %product), kind=kLoop, calls=%fused
  %alone = f32[4,2]{1,0} all-reduce(%slice), channel_id=3, replica_groups={{0},{1}}, to_apply=%add
  ROOT %out = (s32[], f32[3,4,2]{2,1,0}, bf16[2]{0}) tuple(%state, %used)
}

%fused (p: f32[64]) -> f32[5] {
  %p = f32[64]{0} parameter(0)
  ROOT %inside = f32[5,777]{1,0} broadcast(%p)
}

%condition (state: (s32[], f32[3,4,2], bf16[2])) -> pred[] {
  ROOT %less = pred[] parameter(0)
}

ENTRY %main (given: f32[4,2]) -> f32[] {
  %given = f32[4,2]{1,0} parameter(0)
  %while = (s32[], f32[3,4,2]{2,1,0}, bf16[2]{0}) while(%given), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"},"other":1}
  %both = (f32[4,2]{1,0}, bf16[6]{0}) all-reduce(%given, %given), replica_groups=mesh['a'=2,'b'=4] {'a','b'}, to_apply=%add
  ROOT %sent = f32[4,2]{1,0} collective-permute(%given), source_target_pairs={{0,1},{1,0}}
}
"""


def test_transfers_and_how_often():
    found = [(c.kind, c.bytes, c.times, c.group_size, c.loop) for c in Program(TEXT).collectives()]
    assert sorted(found) == [
        ("all-gather", 256, 3, 8, "body"),
        ("all-gather", 256, 3, 8, "body"),
        # Operands of 2 x 32 bytes; the sum of a group of one device moves nothing.
        ("all-reduce", 64, 1, 8, ""),
        ("collective-permute", 32, 1, 0, ""),
    ]
    assert Program(TEXT).bytes_by_kind() == {"all-gather": 1536, "all-reduce": 64, "collective-permute": 32}


def test_what_is_gathered_at_once():
    # The first and its transposed copy; a bitcast is no memory, and the second comes when both are done with.
    assert Program(TEXT).gathered_at_once() == {"body": 512}


def test_arrays():
    arrays = Program(TEXT).arrays()
    assert ArrayType("f32", (5, 777)) in arrays, "inside a fusion"
    assert {a.bytes for a in arrays if a.dtype in ("bf16", "pred", "s32")} == {12, 4, 1}


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("nothing")
