// Asks for a code over raw Redis, with nothing but Node: SUBSCRIBE, LPUSH, GET, as every caller does.
//
//   node ask.mjs a@example.com
import { randomUUID } from "node:crypto";
import net from "node:net";

const PATIENCE = 5; // seconds
const { REDIS_HOST = "127.0.0.1", REDIS_PORT = "6379", REDIS_PASSWORD } = process.env;

async function* linesOf(socket) {
  let text = "";
  for await (const chunk of socket.setEncoding("utf8")) {
    const lines = (text + chunk).split("\r\n");
    text = lines.pop();
    yield* lines;
  }
  throw new Error("Redis closed the connection");
}

// One answer of Redis; no string in it has a line break, for it is JSON.
async function read(lines) {
  const line = (await lines.next()).value;
  const [kind, text] = [line[0], line.slice(1)];
  if (kind === "-") throw new Error(text);
  if (kind === "$") return text === "-1" ? null : (await lines.next()).value;
  if (kind !== "*") return text;
  const items = [];
  while (items.length < Number(text)) items.push(await read(lines));
  return items;
}

async function connect() {
  const socket = net.connect(Number(REDIS_PORT), REDIS_HOST);
  const lines = linesOf(socket);
  const call = (...words) => {
    socket.write(`*${words.length}\r\n` + words.map((word) => `$${Buffer.byteLength(word)}\r\n${word}\r\n`).join(""));
    return read(lines);
  };
  if (REDIS_PASSWORD) await call("AUTH", REDIS_PASSWORD);
  return { call, lines };
}

setTimeout(() => (console.error(`no reply within ${PATIENCE} s`), process.exit(1)), PATIENCE * 1000);
const id = randomUUID();
const key = `celery-task-meta-${id}`;
const body = Buffer.from(JSON.stringify([[], { email: process.argv[2] }, {}])).toString("base64");
const headers = { task: "verification.send_code", id };
const delivery_info = { exchange: "", routing_key: "verification" };
const properties = { delivery_tag: randomUUID(), body_encoding: "base64", delivery_info };
const form = { "content-type": "application/json", "content-encoding": "utf-8" };
const [listener, client] = await Promise.all([connect(), connect()]);
await listener.call("SUBSCRIBE", key);
await client.call("SELECT", "1");
await client.call("LPUSH", "verification", JSON.stringify({ body, ...form, headers, properties }));
await client.call("SELECT", "2");
const reply = JSON.parse((await client.call("GET", key)) ?? (await read(listener.lines))[2]).result;
console.log(JSON.stringify(reply));
process.exit(reply.error === 0 ? 0 : 1);
