"""tf.train.Example, the record of TFDS and of most ArrayRecords, without TF.

The message is declared here from its public definition: a map of names to
lists of bytes, of floats or of integers.
"""

from collections.abc import Mapping
import functools
import io
from typing import Any

import numpy as np

from mmjax.data.sources.records import BadRecord, Record


@functools.cache
def _message() -> Any:
  """The class of the message, in a pool of its own: TF may be there too."""
  from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

  field = descriptor_pb2.FieldDescriptorProto
  file = descriptor_pb2.FileDescriptorProto(
      name="mmjax_example.proto", package="mmjax", syntax="proto3"
  )

  def declare(holder: Any, name: str, *rows: tuple[Any, ...]) -> Any:
    holder.name = name
    for number, (key, kind, label, of) in enumerate(rows, 1):
      holder.field.add(
          name=key, number=number, type=kind, label=label, type_name=of
      )
    return holder

  one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
  for name, kind in (
      ("BytesList", field.TYPE_BYTES),
      ("FloatList", field.TYPE_FLOAT),
      ("Int64List", field.TYPE_INT64),
  ):
    declare(file.message_type.add(), name, ("value", kind, many, None))
  feature = declare(
      file.message_type.add(),
      "Feature",
      ("bytes_list", field.TYPE_MESSAGE, one, ".mmjax.BytesList"),
      ("float_list", field.TYPE_MESSAGE, one, ".mmjax.FloatList"),
      ("int64_list", field.TYPE_MESSAGE, one, ".mmjax.Int64List"),
  )
  feature.oneof_decl.add(name="kind")
  for row in feature.field:
    row.oneof_index = 0
  features = declare(
      file.message_type.add(),
      "Features",
      ("feature", field.TYPE_MESSAGE, many, ".mmjax.Features.FeatureEntry"),
  )
  entry = declare(
      features.nested_type.add(),
      "FeatureEntry",
      ("key", field.TYPE_STRING, one, None),
      ("value", field.TYPE_MESSAGE, one, ".mmjax.Feature"),
  )
  entry.options.map_entry = True
  declare(
      file.message_type.add(),
      "Example",
      ("features", field.TYPE_MESSAGE, one, ".mmjax.Features"),
  )
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  found = pool.FindMessageTypeByName("mmjax.Example")
  return message_factory.GetMessageClass(found)


def parse(data: bytes) -> Record:
  """The fields of a message: a list of one value is that value.

  Raises:
    BadRecord: if it is no such message.
  """
  from google.protobuf.message import DecodeError

  try:
    message = _message().FromString(data)
  except DecodeError:
    raise BadRecord("no tf.train.Example") from None
  record: Record = {}
  for name, feature in message.features.feature.items():
    kind = feature.WhichOneof("kind")
    if kind is None:
      continue
    values = getattr(feature, kind).value
    if len(values) == 1:
      record[name] = values[0]
    elif kind == "bytes_list":
      record[name] = list(values)
    else:
      dtype = np.float32 if kind == "float_list" else np.int64
      record[name] = np.asarray(values, dtype)
  return record


def serialise(record: Mapping[str, Any]) -> bytes:
  """A message with the fields of a record.

  Text becomes UTF-8, floats lose what float32 does not hold, and arrays of
  more than one axis become .npy files.

  Raises:
    BadRecord: if a value has no place in such a message.
  """
  message = _message()()
  for name, value in record.items():
    feature = message.features.feature[name]
    if isinstance(value, np.ndarray) and value.ndim > 1:
      value = npy(value)
    values = value if isinstance(value, (list, np.ndarray)) else [value]
    values = [v.encode() if isinstance(v, str) else v for v in values]
    if all(isinstance(v, (bytes, bytearray, memoryview)) for v in values):
      feature.bytes_list.value.extend(map(bytes, values))
    elif all(isinstance(v, (bool, int, np.integer)) for v in values):
      feature.int64_list.value.extend(map(int, values))
    elif all(isinstance(v, (int, float, np.number)) for v in values):
      feature.float_list.value.extend(map(float, values))
    else:
      raise BadRecord(f"{name!r}: a list of unlike values has no place")
  return message.SerializeToString(deterministic=True)


def npy(value: np.ndarray) -> bytes:
  """An array as an .npy file; one of objects is refused."""
  file = io.BytesIO()
  np.save(file, value, allow_pickle=False)
  return file.getvalue()
