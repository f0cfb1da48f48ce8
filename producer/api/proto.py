"""`message.proto` without generated code: the same descriptor, built here.

Generated code binds a checkout to one protobuf version, and its compiler would be needed wherever the doors are set up.
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
    """What a compiler makes of `message.proto`."""
    package, _, service = SERVICE.partition(".")
    file = descriptor_pb2.FileDescriptorProto(name="message.proto", package=package, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields, 1):
            message.field.add(name=field, number=number, type=kind, label=_Field.LABEL_OPTIONAL, json_name=field)
    method = file.service.add(name=service).method.add(name=METHOD)
    method.input_type, method.output_type = (f".{package}.{name}" for name in _MESSAGES)
    method.options.SetInParent()  # `{}` after the method is an empty set of options
    return file


# A pool of our own: a caller's process may hold the tutorial's generated code, of the same names, in the default one.
POOL: Final = descriptor_pool.DescriptorPool()
POOL.Add(file_descriptor())
GetVarifyReq: Final[Any] = message_factory.GetMessageClass(POOL.FindMessageTypeByName("message.GetVarifyReq"))
GetVarifyRsp: Final[Any] = message_factory.GetMessageClass(POOL.FindMessageTypeByName("message.GetVarifyRsp"))
