"""The descriptor of `message.proto`, built here instead of by generated code.

Generated code works with one protobuf version only, and every installation would need its compiler.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE: Final = "message.VarifyService"
METHOD: Final = "GetVarifyCode"

_Field = descriptor_pb2.FieldDescriptorProto
_MESSAGES: Final = {
    "GetVarifyReq": (("email", _Field.TYPE_STRING),),
    "GetVarifyRsp": (("error", _Field.TYPE_INT32), ("email", _Field.TYPE_STRING), ("code", _Field.TYPE_STRING)),
}


def file_descriptor() -> descriptor_pb2.FileDescriptorProto:
    """What protoc makes of `message.proto`."""
    package, _, service = SERVICE.partition(".")
    file = descriptor_pb2.FileDescriptorProto(name="message.proto", package=package, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields, 1):
            message.field.add(name=field, number=number, type=kind, label=_Field.LABEL_OPTIONAL, json_name=field)
    method = file.service.add(name=service).method.add(name=METHOD)
    method.input_type, method.output_type = (f".{package}.{name}" for name in _MESSAGES)
    method.options.SetInParent()  # the `{}` after the method is an empty set of options
    return file


# Not the default pool: there a caller's process may hold the tutorial's generated code with the same names.
POOL: Final = descriptor_pool.DescriptorPool()
POOL.Add(file_descriptor())
GetVarifyReq: Final[Any] = message_factory.GetMessageClass(POOL.FindMessageTypeByName("message.GetVarifyReq"))
GetVarifyRsp: Final[Any] = message_factory.GetMessageClass(POOL.FindMessageTypeByName("message.GetVarifyRsp"))
