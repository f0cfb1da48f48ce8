// Asks for a code over plain Redis, with nothing but Node: SUBSCRIBE, LPUSH, GET.
//
//   node ask.mjs a@example.com
import { randomUUID } from "node:crypto";
import net from "node:net";
import tls from "node:tls";

const { VERIFY_REDIS_URL = "redis://127.0.0.1:6379", VERIFY_REPLY_TIMEOUT = "5" } = process.env;
const url = new URL(VERIFY_REDIS_URL);

async function* linesOf(socket) {
  let text = "";
  for await (const chunk of socket.setEncoding("utf8")) {
    const lines = (text + chunk).split("\r\n");
    text = lines.pop();
    yield* lines;
  }
  throw new Error("Redis closed the connection");
}

// Reads one answer of Redis. No string in it has a line break, because all of them are JSON.
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
  const { protocol, hostname: host, username, password } = url;
  const options = { host, port: Number(url.port || 6379), servername: host };
  const socket = protocol === "rediss:" ? tls.connect(options) : net.connect(options);
  const lines = linesOf(socket);
  const call = (...words) => {
    socket.write(`*${words.length}\r\n` + words.map((word) => `$${Buffer.byteLength(word)}\r\n${word}\r\n`).join(""));
    return read(lines);
  };
  if (password) await call("AUTH", ...[username, password].filter(Boolean).map(decodeURIComponent));
  return { call, lines };
}

setTimeout(() => (console.error(`no reply within ${VERIFY_REPLY_TIMEOUT} s`), process.exit(1)), VERIFY_REPLY_TIMEOUT * 1000);
const id = randomUUID();
const key = `celery-task-meta-${id}`;
const body = Buffer.from(JSON.stringify([[], { email: process.argv[2] }, {}])).toString("base64");
const headers = { task: "verification.send_code", id };
const delivery_info = { exchange: "", routing_key: "verification" };
const properties = { delivery_tag: randomUUID(), body_encoding: "base64", delivery_info };
const content = { "content-type": "application/json", "content-encoding": "utf-8" };
const [subscriber, client] = await Promise.all([connect(), connect()]);
await subscriber.call("SUBSCRIBE", key);
await client.call("SELECT", "1");
await client.call("LPUSH", "verification", JSON.stringify({ body, ...content, headers, properties }));
await client.call("SELECT", "2");
const reply = JSON.parse((await client.call("GET", key)) ?? (await read(subscriber.lines))[2]).result;
console.log(JSON.stringify(reply));
process.exit(reply.error === 0 ? 0 : 1);
