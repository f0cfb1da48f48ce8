// The progress of one request. Lines may come in a burst; the marker takes its time, the figures are the API's.

import { span } from "./words.js";

const STAGES = ["api", "queue", "worker", "relay", "reply"];
const LAST = STAGES.length - 1;
const OUTCOMES = { good: "i-check", bad: "i-cross", stuck: "i-dots" };
const HOP = 260; // ms that the marker stays at a stage at least, so that an eye can follow
const PAUSE = 700; // ms at one stage before its running time shows, and before the form says where the request is
const STILL = matchMedia("(prefers-reduced-motion: reduce)");
// Errors without a mail: the stages that were not reached were not needed.
const WITHOUT_MAIL = new Set([1, 2, 3, 4, 1001]);

export class Progress {
  constructor(page) {
    this.page = page;
    this.list = document.querySelector("#stages");
    this.stops = STAGES.map((name) => this.list.querySelector(`[data-stage=${name}]`));
    this.caption = document.querySelector("#progress-caption");
    this.legend = document.querySelector("#progress-legend");
    this.run = 0;
    this.clear();
    setInterval(() => this.tick(), 100);
  }

  clear() {
    this.run += 1;
    this.at = -1; // index of the stage where the marker is
    this.times = []; // seconds from the request's arrival, by stage
    this.lines = []; // received and not shown yet
    this.moving = false;
    this.note = "";
    this.tries = 0;
    this.error = null;
    this.began = null;
    this.here = Infinity; // when the marker came to its stage; ms of performance.now()
    this.render();
  }

  begin() {
    this.clear();
    this.began = performance.now();
  }

  receive(line) {
    this.lines.push(line);
    if (!this.moving) this.advance(this.run);
  }

  // The connection to the API broke.
  lose() {
    this.receive({ stage: "reply", error: "away" });
  }

  advance(run) {
    if (run !== this.run) return;
    const line = this.lines.shift();
    this.moving = line !== undefined;
    if (!this.moving) return;
    this.show(line);
    const pause = line.note || STILL.matches ? 0 : HOP;
    if (pause) setTimeout(() => this.advance(run), pause);
    else this.advance(run);
  }

  show(line) {
    if (line.note) {
      this.note = line.note;
      if (line.note === "again") this.tries += 1;
    } else if (line.error !== undefined) {
      this.stuck = this.at;
      this.error = line.error;
      this.times[LAST] = line.at;
      this.at = LAST;
    } else {
      this.at = STAGES.indexOf(line.stage);
      this.times[this.at] = line.at;
      this.note = "";
      this.here = performance.now();
    }
    this.render();
  }

  // Of the stage with this index: ahead, here, stuck, done, skipped; of the last one: good, bad, stuck.
  state(index) {
    if (this.error === null) {
      if (index > this.at) return "ahead";
      if (index < this.at) return "done";
      return this.note ? "stuck" : "here";
    }
    if (index === LAST) return this.error === 0 ? "good" : this.error === 6 ? "stuck" : "bad";
    if (index < this.stuck) return "done";
    if (this.error === 0 || this.error === 5) return "done";
    if (WITHOUT_MAIL.has(this.error)) return index === this.stuck ? "done" : "skipped";
    if (index === this.stuck) return this.error === "away" ? "done" : "stuck";
    return "ahead";
  }

  // The time that the request spent at a stage; at the last one, the time in all.
  time(say, index) {
    const began = this.times[index];
    if (began === undefined) return "";
    if (index === LAST) return say.total(span(say, began));
    const ended = this.times.slice(index + 1).find((each) => each !== undefined);
    return ended === undefined ? "" : span(say, ended - began);
  }

  render() {
    const say = this.page.say;
    const going = this.began !== null && this.error === null;
    this.list.toggleAttribute("data-going", going);
    if (going && this.note) this.list.dataset.going = "stuck";
    const fill = this.error === null ? this.at : this.error === 0 || this.error === 5 ? LAST : this.stuck;
    this.list.style.setProperty("--at", String(Math.max(0, fill)));
    this.stops.forEach((stop, index) => {
      const state = this.at < 0 ? "ahead" : this.state(index);
      stop.dataset.state = state;
      if (state === "here" || (state === "stuck" && going)) stop.setAttribute("aria-current", "step");
      else stop.removeAttribute("aria-current");
      stop.querySelector(".time").textContent = this.time(say, index);
      if (index === LAST) stop.querySelector("use").setAttribute("href", `#${OUTCOMES[state] ?? "i-reply"}`);
      stop.querySelector(".state").textContent = say.state[state];
    });
    this.legend.hidden = this.at < 0;
    this.caption.textContent = this.sentence(say);
    this.page.show("ask");
  }

  // What the form says while the request waits: where, and why, once it stays there for longer than an eye notices.
  waiting(say) {
    return this.note || performance.now() - this.here > PAUSE ? this.sentence(say) : say.asking;
  }

  sentence(say) {
    const { give_up: giveUp = 300 } = this.page.facts ?? {};
    if (this.at < 0) return say.at.idle;
    if (this.error === null) {
      if (this.note === "no worker") return say.no_worker(giveUp);
      if (this.note === "again") return say.retry(this.tries);
      return say.at[STAGES[this.at]];
    }
    const end = this.times[LAST];
    if (this.error === 0) return say.done(span(say, end));
    if (this.error === "away") return say.lost;
    if (this.error === 1) return say.broken;
    if (this.error === 5) return say.rejected;
    if (this.error === 6) return this.stuck >= 2 ? say.too_late.relay(giveUp) : say.too_late.queue(end, giveUp);
    return this.stuck >= 2 ? say.worker_said : say.refused;
  }

  // The running time at the stage where the request waits.
  tick() {
    if (this.error !== null || this.at < 0 || performance.now() - this.here < PAUSE) return;
    const elapsed = (performance.now() - this.here) / 1000;
    this.stops[this.at].querySelector(".time").textContent = this.page.say.s(elapsed.toFixed(1));
    this.page.show("ask");
  }
}
