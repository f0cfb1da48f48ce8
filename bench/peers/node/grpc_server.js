// The old server's gRPC API: message.VarifyService/GetVarifyCode.
'use strict';

const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

/** Serve `handle(email) -> error` at `port` (0: a free one); resolves with the port. */
function serve(port, handle) {
  const loaded = protoLoader.loadSync(process.env.PEER_PROTO, { keepCase: true });
  const { message } = grpc.loadPackageDefinition(loaded);
  const server = new grpc.Server();
  server.addService(message.VarifyService.service, {
    GetVarifyCode: async (call, callback) => {
      const { email } = call.request;
      let error = 2; // Exception
      try {
        error = await handle(email);
      } catch (failure) {
        console.error(failure.message);
      }
      callback(null, { email, error });
    },
  });
  return new Promise((resolve, reject) => {
    server.bindAsync(`127.0.0.1:${port}`, grpc.ServerCredentials.createInsecure(), (failure, bound) =>
      failure ? reject(failure) : resolve(bound),
    );
  });
}

module.exports = { serve };
