"""All spellings of replica groups."""

import pytest

from mmjax.perf import groups


def test_groups_in_all_their_spellings():
  assert groups.first("replica_groups={{0,2},{1,3}}, x={1}", 4) == (0, 2)
  assert groups.first("replica_groups={}, x=1", 4) == (0, 1, 2, 3)
  assert groups.first("replica_groups=[2,4]<=[8], x=1", 8) == (0, 1, 2, 3)
  # arange(8).reshape(4, 2).T.reshape(2, 4)
  assert groups.first("replica_groups=[2,4]<=[4,2]T(1,0)", 8) == (0, 2, 4, 6)
  # arange(8).reshape(2, 2, 2).transpose(1, 0, 2).reshape(2, 4)
  iota = "replica_groups=[2,4]<=[2,2,2]T(1,0,2)"
  assert groups.first(iota, 8) == (0, 1, 4, 5)
  # A mesh with named axes: whole axes, parts of one, devices in any order.
  mesh = "replica_groups=mesh['a'=2,'b'=4]"
  assert groups.first(mesh + " {'a'}, x={1}", 8) == (0, 4)
  assert groups.first(mesh + " {'a','b'}", 8) == tuple(range(8))
  assert groups.first(mesh + " {'b':(2)2}", 8) == (0, 1)
  assert groups.first(mesh + " {'b':(1)2}", 8) == (0, 2)
  assert groups.first(mesh + " {'a','b':(1)2}", 8) == (0, 2, 4, 6)
  turned = ", device_ids=([4,2]T(1,0)) {'b'}, to_apply=%add"
  assert groups.first(mesh + turned, 8) == (0, 2, 4, 6)
  listed = ", device_ids=(7,6,5,4,3,2,1,0) {'a'}"
  assert groups.first(mesh + listed, 8) == (7, 3)
  with pytest.raises(ValueError, match="unknown form"):
    groups.first("replica_groups=new{0}", 8)
  assert groups.first("source_target_pairs={{0,2},{2,0},{1,3}}", 4) == (0, 2)


def test_slices():
  every = '_xla_megascale_target="{1,2,3}x{0:15}",_xla_megascale_x="y"'
  assert groups.between_slices(every) == (1, 2, 3)
  # Slices 1 and 3, device 0 of each; and so on.
  some = "_xla_megascale_target={{100000,300000},{200000,400000}}"
  assert groups.between_slices(some) == (1, 3)
