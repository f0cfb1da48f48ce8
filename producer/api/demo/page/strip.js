// The way of one request. Lines come in a burst when all goes well; the marker takes its time, the figures are the door's.

import { span } from "./words.js";

const NAMES = ["door", "queue", "worker", "relay", "reply"];
const OUTCOMES = { good: "i-check", bad: "i-cross", stuck: "i-dots" };
const HOP = 260; // ms that the marker stays at a station at least, so that an eye can follow
const PATIENCE = 700; // ms at one station before the clock that runs there shows
const STILL = matchMedia("(prefers-reduced-motion: reduce)");
// Answers that come without a mail: what was not passed by then was not needed.
const WITHOUT_A_MAIL = new Set([1, 2, 3, 4, 1001]);

export class Strip {
  constructor(page) {
    this.page = page;
    this.list = document.querySelector("#stations");
    this.stops = NAMES.map((name) => this.list.querySelector(`[data-station=${name}]`));
    this.says = document.querySelector("#way-says");
    this.live = document.querySelector("#way-live");
    this.since = document.querySelector("#since");
    this.run = 0;
    this.clear();
    setInterval(() => this.tick(), 100);
  }

  clear() {
    this.run += 1;
    this.at = -1; // index of the station where the marker is
    this.times = [];
    this.waiting = []; // lines that came and are not shown
    this.moving = false;
    this.note = "";
    this.tries = 0;
    this.error = null;
    this.began = null;
    this.render();
  }

  begin() {
    this.clear();
    this.began = performance.now();
  }

  hear(line) {
    this.waiting.push(line);
    if (!this.moving) this.advance(this.run);
  }

  // The door went away in the middle.
  lose() {
    this.hear({ station: "reply", error: "away" });
  }

  advance(run) {
    if (run !== this.run) return;
    const line = this.waiting.shift();
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
      this.times[NAMES.length - 1] = line.at;
      this.at = NAMES.length - 1;
    } else {
      this.at = NAMES.indexOf(line.station);
      this.times[this.at] = line.at;
      this.note = "";
      this.here = performance.now();
    }
    this.render();
  }

  // Of the station with this index: ahead, here, stuck, done, skipped; of the last: good, bad, late.
  state(index) {
    if (this.error === null) {
      if (index > this.at) return "ahead";
      if (index < this.at) return "done";
      return this.note ? "stuck" : "here";
    }
    if (index === NAMES.length - 1) return this.error === 0 ? "good" : this.error === 6 ? "stuck" : "bad";
    if (index < this.stuck) return "done";
    if (this.error === 0 || this.error === 5) return "done";
    if (WITHOUT_A_MAIL.has(this.error)) return index === this.stuck ? "done" : "skipped";
    if (index === this.stuck) return this.error === "away" ? "done" : "stuck";
    return "ahead";
  }

  render() {
    const say = this.page.say;
    const going = this.began !== null && this.error === null;
    this.list.toggleAttribute("data-going", going);
    if (going && this.note) this.list.dataset.going = "stuck";
    const fill = this.error === null ? this.at : this.error === 0 || this.error === 5 ? 4 : this.stuck;
    this.list.style.setProperty("--at", String(Math.max(0, fill)));
    this.stops.forEach((stop, index) => {
      const state = this.at < 0 ? "ahead" : this.state(index);
      stop.dataset.state = state;
      if (state === "here" || (state === "stuck" && going)) stop.setAttribute("aria-current", "step");
      else stop.removeAttribute("aria-current");
      const time = this.times[index];
      const shown = time === undefined ? "" : span(say, time);
      stop.querySelector(".time").textContent = shown;
      if (index === NAMES.length - 1) stop.querySelector("use").setAttribute("href", `#${OUTCOMES[state] ?? "i-reply"}`);
      stop.querySelector(".state").textContent = say.state[state];
    });
    this.since.hidden = this.at < 0;
    const sentence = this.sentence(say);
    if (this.says.textContent === sentence) return;
    this.says.textContent = sentence;
    // Who listens is told where it stays, not each station that it flies past.
    clearTimeout(this.telling);
    if (this.began !== null) this.telling = setTimeout(() => (this.live.textContent = sentence), PATIENCE);
  }

  sentence(say) {
    const { give_up: giveUp = 300 } = this.page.facts ?? {};
    if (this.at < 0) return say.at.idle;
    if (this.error === null) {
      if (this.note === "no worker") return say.no_worker(giveUp);
      if (this.note === "again") return say.retry(this.tries);
      return say.at[NAMES[this.at]];
    }
    const end = this.times[4];
    if (this.error === 0) {
      const relay = this.times[3] === undefined ? "" : span(say, end - this.times[3]);
      return say.done(relay, span(say, end));
    }
    if (this.error === "away") return say.lost;
    if (this.error === 1) return say.broken;
    if (this.error === 5) return say.rejected;
    if (this.error === 6) return (this.stuck >= 2 ? say.too_late.relay : say.too_late.queue)(end, giveUp);
    return this.stuck >= 2 ? say.worker_said : say.refused;
  }

  // The time at the station where it waits, for eyes only.
  tick() {
    if (this.error !== null || this.at < 0 || performance.now() - this.here < PATIENCE) return;
    const elapsed = (performance.now() - this.began) / 1000;
    this.stops[this.at].querySelector(".time").textContent = this.page.say.s(elapsed.toFixed(1));
  }
}
