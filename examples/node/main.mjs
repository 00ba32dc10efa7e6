// Usage: node main.mjs "Once upon a time" '{"max_tokens": 60, "seed": 7}'   submit and stream
//        node main.mjs --job ID                                             follow a job submitted by anyone
import { createClient } from "redis";
import { stream, submit } from "./penstock.mjs";

const [first, second] = process.argv.slice(2);
if (first === undefined) {
  console.error("give a prompt, or --job and an id");
  process.exit(2);
}
const queue = process.env.PENSTOCK_QUEUE ?? "penstock-story";
const redis = createClient({ url: process.env.PENSTOCK_REDIS_URL ?? "redis://127.0.0.1:6379" });
redis.on("error", (error) => console.error(`redis: ${error.message}`));
await redis.connect();
try {
  const id = first === "--job" ? second : await submit(redis, queue, first, JSON.parse(second ?? "{}"));
  console.error(`job ${id}`);
  const events = stream(redis, queue, id);
  let step = await events.next();
  for (; !step.done; step = await events.next()) process.stdout.write(step.value.choice === 0 ? step.value.text : "");
  console.error(`\n${step.value.state}${step.value.failure ? `: ${step.value.failure[1]}` : ""}`);
  process.exitCode = step.value.state === "completed" ? 0 : 1;
} finally {
  await redis.close();
}
