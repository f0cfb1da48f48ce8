// Asks the gRPC API for a code, with @grpc/grpc-js and @grpc/proto-loader, and prints the reply.
//
//   npm install --no-save @grpc/grpc-js @grpc/proto-loader
//   node ask_grpc.mjs a@example.com
//
// API_KEY is a key of the API, where it asks for one.
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const { GRPC_API = "127.0.0.1:50051", API_KEY } = process.env;
const proto = new URL("../producer/api/message.proto", import.meta.url); // copy it into your own project

const { message } = grpc.loadPackageDefinition(loadSync(fileURLToPath(proto)));
const api = new message.VarifyService(GRPC_API, grpc.credentials.createInsecure());
const metadata = new grpc.Metadata();
if (API_KEY) metadata.set("authorization", `Bearer ${API_KEY}`);
// The API answers within VERIFY_REPLY_TIMEOUT (5 s); the 10 s are for an API that is down.
api.GetVarifyCode({ email: process.argv[2] }, metadata, { deadline: Date.now() + 10_000 }, (error, reply) => {
  if (error) console.error(`no reply: ${error.message}`);
  else console.log(JSON.stringify({ email: reply.email, error: reply.error ?? 0 }));
  process.exit(!error && !reply.error ? 0 : 1);
});
