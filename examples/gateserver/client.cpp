// Does what GateServer does, to try VerifyServer: asks for a code over gRPC without a deadline, or checks one.
//
//   protoc -I../../producer/api --cpp_out=. message.proto
//   protoc -I../../producer/api --grpc_out=. --plugin=protoc-gen-grpc=$(which grpc_cpp_plugin) message.proto
//   g++ -std=c++17 client.cpp message.*.cc -o client $(pkg-config --cflags --libs grpc++ protobuf jsoncpp)
//   ./client 127.0.0.1 50051 a@example.com
//   ./client 127.0.0.1 8081 a@example.com 123456
#include <grpcpp/grpcpp.h>
#include <iostream>
#include "check.h"
#include "message.grpc.pb.h"

int main(int count, char** words) {
    if (count == 5) {
        const int error = CheckVarifyCode(words[1], words[2], words[3], words[4]);
        std::cout << error << "\n";
        return error != 0;
    }
    if (count != 4) {
        std::cerr << "client HOST GRPC_PORT EMAIL | client HOST HTTP_PORT EMAIL CODE\n";
        return 2;
    }
    const std::string api = std::string(words[1]) + ":" + words[2];
    auto stub = message::VarifyService::NewStub(grpc::CreateChannel(api, grpc::InsecureChannelCredentials()));
    grpc::ClientContext context;
    message::GetVarifyReq request;
    message::GetVarifyRsp reply;
    request.set_email(words[3]);
    const grpc::Status status = stub->GetVarifyCode(&context, request, &reply);
    if (!status.ok()) reply.set_error(1002);  // GateServer's RPCFailed
    std::cout << reply.error() << " " << reply.email() << reply.code() << "\n";
    return reply.error() != 0;
}
