// Penstock in JavaScript: submit a job and stream its tokens, as docs/protocol.md says. Nothing here is Penstock's own
// library: the transitions are the same Lua scripts that every producer and worker calls, the records are msgpack.
import { createHash, randomBytes, randomInt } from "node:crypto";
import { readFileSync } from "node:fs";
import { decode, encode } from "@msgpack/msgpack";
import { RESP_TYPES, SocketClosedUnexpectedlyError } from "redis";

const here = new URL("../../core/penstock_core/protocol/scripts/", import.meta.url).pathname;
const scripts = process.env.PENSTOCK_SCRIPTS ?? here;
const VERSION = 1;
const [CHUNK, ENDED] = [0, 1];
const BACKSTOP_MS = 5000;

/** A script is its file, with `--@include a b` replaced by shared/a.lua and shared/b.lua. */
function script(name) {
  const read = (path) => readFileSync(`${scripts}/${path}.lua`, "utf8");
  const text = read(name).replace(/^--@include (.+)$/m, (_, parts) =>
    parts.trim().split(" ").map((part) => read(`shared/${part}`)).join("\n"));
  return { text, sha1: createHash("sha1").update(text).digest("hex") };
}
const SUBMIT = script("submit");
const READ_EVENTS = script("read_events");

/**
 * Call a script by its SHA-1; send it whole only to a server that does not know it yet. ARGV[1] 0: the server's clock.
 * Both scripts used here may be repeated, and are when the connection was lost before the reply.
 */
async function call(redis, queue, script, ...args) {
  const ARGV = ["0", ...args.map((arg) => (Buffer.isBuffer(arg) ? arg : String(arg)))];
  const options = { keys: [`penstock:{${queue}}:`], arguments: ARGV };
  const client = redis.withTypeMapping({ [RESP_TYPES.BLOB_STRING]: Buffer }); // bytes, not text
  return client.evalSha(script.sha1, options).catch((error) => {
    if (error instanceof SocketClosedUnexpectedlyError) return call(redis, queue, script, ...args);
    if (!String(error.message).startsWith("NOSCRIPT")) throw error;
    return client.eval(script.text, options);
  });
}

/** Submit a job and return its id. The id is made here, so that sending the job again after a lost reply is harmless. */
export async function submit(redis, queue, prompt, sampling = {}, id = randomBytes(16).toString("hex")) {
  const seed = sampling.seed ?? randomInt(2 ** 47); // always with a seed: a resumed job goes on with the same noise
  const request = Buffer.from(encode([VERSION, { prompt, sampling: { ...sampling, seed } }]));
  const cost = [Math.floor(Buffer.byteLength(prompt) / 4) + 1, (sampling.max_tokens ?? 256) * (sampling.n ?? 1)];
  // options: priority, tenant, token estimates, deadline, delay, not before, retries, TTL
  const options = [5, "default", ...cost, 0, 0, 0, 3, 3_600_000].join(" ");
  const job = [id, request, options, "", "", "", ""]; // affinity, idempotency key, metadata, traceparent
  const [[status, ...why]] = await call(redis, queue, SUBMIT, "", 1, ...job);
  if (status.toString() === "full") {
    throw new Error(`the queue is full: ${why[0]} is ${why[1]} of ${why[2]}; try again in ${why[3]} ms`);
  }
  return id;
}

/** Yield {choice, text, tokenIds} as they come, without gap or repetition; return {state, failure} at the end. */
export async function* stream(redis, queue, id) {
  const known = new Map(); // choice -> offset after the last token seen
  const finished = new Set(); // choices whose last chunk was seen
  const inbox = []; // events pushed; null: look into the log
  let last = ""; // log entry seen last
  let wake = () => {};
  const put = (event) => (inbox.push(event), wake());

  async function* log() {
    for (let entries = [0, 0]; entries.length; last = entries.at(-2).toString()) {
      const [state, found] = await call(redis, queue, READ_EVENTS, id, last, 1000);
      if (state === undefined) throw new Error(`there is no job ${id}, or no longer`);
      if (!(entries = found).length) return;
      for (let at = 1; at < entries.length; at += 2) yield event(entries[at]);
    }
  }

  // 1. Subscribe and wait for the acknowledgement; 2. then read the log from the beginning. Push is at most once:
  // after a reconnection, and now and then while nothing comes, the log is looked into again.
  const listener = redis.duplicate().on("error", () => {}).on("ready", () => put(null));
  await listener.connect();
  await listener.subscribe(`penstock:{${queue}}:channel:${id}`, (message) => put(event(message)), true);
  const backstop = setInterval(() => put(null), BACKSTOP_MS);
  try {
    for (put(null); ; ) {
      if (!inbox.length) await new Promise((resolve) => (wake = resolve));
      const pushed = inbox.shift();
      // 3. Only a pushed chunk that is exactly the next is taken as it is. A known one is dropped; on a hole, at the
      // end, and for text alone, of which offsets cannot tell a copy from a new one, the log is read on.
      const next = pushed?.[1] === CHUNK && pushed[5].length > 0 ? pushed[4] - (known.get(pushed[3]) ?? 0) : 1;
      if (next < 0) continue;
      for await (const [, kind, ...fields] of next === 0 ? [pushed] : log()) {
        if (kind === ENDED) return { state: fields[0], failure: fields[3] }; // 4.
        const [, choice, offset, tokenIds, pieces, finishReason] = fields;
        const end = offset + tokenIds.length;
        if (finished.has(choice) || (tokenIds.length > 0 && end <= (known.get(choice) ?? 0))) continue;
        known.set(choice, end);
        if (finishReason !== null) finished.add(choice);
        yield { choice, text: pieces.join(""), tokenIds };
      }
    }
  } finally {
    clearInterval(backstop);
    await listener.close();
  }
}

/** An event record; elements that a later writer appended are ignored, another version is refused. */
function event(bytes) {
  const record = decode(bytes);
  if (record[0] !== VERSION) throw new Error(`protocol version ${record[0]}, this side reads ${VERSION}`);
  return record;
}
