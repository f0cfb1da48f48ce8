// Asks for a code at the gRPC door, with @grpc/grpc-js and @grpc/proto-loader, and prints the reply.
//
//   npm install --no-save @grpc/grpc-js @grpc/proto-loader
//   node ask_grpc.mjs a@example.com
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const { VERIFY_GRPC_DOOR = "127.0.0.1:50051" } = process.env;
const proto = new URL("../producer/api/message.proto", import.meta.url); // copy it into your own project

const { message } = grpc.loadPackageDefinition(loadSync(fileURLToPath(proto)));
const door = new message.VarifyService(VERIFY_GRPC_DOOR, grpc.credentials.createInsecure());
// The door answers within VERIFY_REPLY_TIMEOUT, 5 s unless set; 10 s are for a door that is not there.
door.GetVarifyCode({ email: process.argv[2] }, { deadline: Date.now() + 10_000 }, (trouble, reply) => {
  if (trouble) console.error(`no reply: ${trouble.message}`);
  else console.log(JSON.stringify({ email: reply.email, error: reply.error ?? 0 }));
  process.exit(!trouble && !reply.error ? 0 : 1);
});
