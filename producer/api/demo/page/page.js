// The signup form. Progress and phone follow its requests by themselves.

import { Phone } from "./phone.js";
import { Progress } from "./progress.js";
import * as requests from "./requests.js";
import { explain, preferred, words } from "./words.js";

const byId = (id) => document.getElementById(id);
const FIELDS = { ask: "email", check: "code", key: "key" }; // the field that each message is about
const ICONS = { good: "i-good", bad: "i-bad", wait: "i-wait", late: "i-wait" };

class Page {
  constructor() {
    this.facts = null;
    this.say = words[preferred()];
    this.asking = this.checking = false;
    this.email = ""; // the address of the last mail
    this.cooled = 0; // when its cooldown and its code end; ms of performance.now()
    this.expiry = null;
    this.answers = { ask: null, check: null, key: null }; // functions of the words: they follow a change of language
    this.progress = new Progress(this);
    this.phone = new Phone(this);
    this.listen();
    this.render();
    this.learn();
    setInterval(() => this.tick(), 250);
  }

  listen() {
    byId("ask").addEventListener("submit", (event) => this.ask(event));
    byId("check").addEventListener("submit", (event) => this.check(event));
    byId("key-form").addEventListener("submit", (event) => this.unlock(event));
    byId("again").addEventListener("click", () => this.restart());
    byId("email").addEventListener("input", () => this.retype());
    byId("code").addEventListener("input", () => this.answer("check", null));
    for (const button of document.querySelectorAll("[data-lang]")) {
      button.addEventListener("click", () => {
        this.say = words[button.dataset.lang];
        this.render();
      });
    }
  }

  // The settings that the page needs; with keys only a caller with a key gets them.
  async learn() {
    try {
      this.facts = await requests.facts();
      byId("code").maxLength = Math.max(this.facts.length, 12);
      byId("flower").hidden = !this.facts.flower;
      if (this.facts.flower) byId("flower").href = this.facts.flower;
      byId("metrics").hidden = this.facts.keys; // a link cannot send a key
      await this.phone.start();
      return true;
    } catch (error) {
      if (error.why === 401) this.lock();
      else this.answer("ask", "bad", (say) => say.errors[error.why] ?? say.errors.away);
      return false;
    } finally {
      this.render();
    }
  }

  lock() {
    byId("key-form").hidden = false;
    byId("metrics").hidden = true;
    this.phone.trouble = "locked";
  }

  async unlock(event) {
    event.preventDefault();
    requests.useKey(byId("key").value.trim());
    const opened = await this.learn();
    byId("key-form").hidden = opened;
    if (opened) byId("email").focus();
    else this.refuse("key", (say) => say.errors[401]);
  }

  async ask(event) {
    event.preventDefault();
    const email = byId("email").value;
    if (this.asking || this.cooling(email)) return;
    if (!email.trim()) {
      this.refuse("ask", (say) => say.errors.no_email);
      return;
    }
    this.asking = true;
    this.answer("check", null);
    this.progress.begin();
    this.answer("ask", "wait", (say) => this.progress.waiting(say));
    this.phone.expect(email);
    try {
      const { error, life } = await requests.request(email, this.say.tag, (line) => this.progress.receive(line));
      this.answered(email, error, life);
    } catch (refused) {
      this.progress.lose();
      this.failed("ask", refused);
    } finally {
      this.asking = false;
      this.render();
    }
  }

  answered(email, error, life) {
    if (error === 0) {
      const now = performance.now();
      this.email = email;
      this.cooled = now + this.facts.cooldown * 1000;
      this.expiry = now + (life ?? this.facts.ttl) * 1000;
      this.answer("ask", "good", (say) => say.sent(email));
      byId("code").value = "";
      byId("code").focus();
      this.phone.look();
    } else if (error === 6) {
      this.answer("ask", "late", (say) => `${this.progress.sentence(say)} ${say.errors[6]}`); // the phone still waits
    } else {
      this.phone.relax();
      this.refuse("ask", (say) => explain(say, this.facts, error));
    }
  }

  // The phone shows the mail.
  arrived(email) {
    if (this.answers.ask?.tone !== "late") return;
    this.email = email;
    this.answer("ask", "good", (say) => say.late_mail);
  }

  async check(event) {
    event.preventDefault();
    const email = this.email || byId("email").value;
    // Chinese and Japanese keyboards can type full-width digits; sent as they are, they would cost an attempt.
    const code = byId("code").value.normalize("NFKC").replace(/\s/g, "");
    if (this.checking) return;
    if (!email.trim()) {
      this.refuse("ask", (say) => say.errors.no_email);
      return;
    }
    if (!code) {
      this.refuse("check", (say) => say.errors.no_code);
      return;
    }
    this.checking = true;
    this.answer("check", "wait", (say) => say.checking);
    try {
      const { error } = await requests.check(email, code);
      if (error === 0) this.succeed(email);
      else {
        if (error === 1003) this.forget();
        this.refuse("check", (say) => explain(say, this.facts, error));
      }
    } catch (refused) {
      this.failed("check", refused);
    } finally {
      this.checking = false;
      this.render();
    }
  }

  succeed(email) {
    this.confirmed = email;
    this.expiry = null;
    this.answer("check", null);
    this.answer("ask", null);
    this.render();
    byId("confirmed-title").focus();
  }

  // There is no live code any more, whatever the countdown says.
  forget() {
    this.expiry = null;
    this.answer("ask", null);
  }

  restart() {
    this.confirmed = null;
    this.email = "";
    byId("email").value = byId("code").value = "";
    this.progress.clear();
    this.render();
    byId("email").focus();
  }

  // Another address: the messages were about the one before.
  retype() {
    if (this.asking) return;
    this.answer("ask", null);
    this.answer("check", null);
    if (this.email && byId("email").value !== this.email) {
      this.email = "";
      this.expiry = null;
    }
    this.render();
  }

  failed(where, refused) {
    if (!(refused instanceof requests.Refused)) throw refused;
    if (refused.why === 401) this.lock();
    this.answer(where, "bad", (say) => say.errors[refused.why] ?? say.errors.away);
  }

  refuse(where, words) {
    const field = FIELDS[where];
    this.answer(where, "bad", words);
    byId(field).setAttribute("aria-invalid", "true");
    byId(field).focus();
    byId(field).select();
  }

  answer(where, tone, words = null) {
    this.answers[where] = tone && { tone, words };
    byId(FIELDS[where]).removeAttribute("aria-invalid");
    this.show(where);
  }

  show(where) {
    const place = byId(`${where}-says`);
    const answer = this.answers[where];
    if (where === "ask") byId("ask-hint").hidden = answer !== null || !this.facts?.inbox;
    if (!answer) {
      place.replaceChildren();
      return;
    }
    const text = answer.words(this.say);
    if (place.textContent === text && place.dataset.tone === answer.tone) return;
    place.dataset.tone = answer.tone;
    const icon = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    icon.setAttribute("aria-hidden", "true");
    icon.append(document.createElementNS("http://www.w3.org/2000/svg", "use"));
    icon.firstChild.setAttribute("href", `#${ICONS[answer.tone]}`);
    place.replaceChildren(icon, Object.assign(document.createElement("span"), { textContent: text }));
  }

  cooling(email) {
    return email === this.email && performance.now() < this.cooled;
  }

  render() {
    const { say } = this;
    document.documentElement.lang = say.tag;
    document.title = `${say.title} · VerifyServer`;
    for (const each of document.querySelectorAll("[data-say]")) each.textContent = say[each.dataset.say];
    for (const each of document.querySelectorAll("[data-label]")) each.setAttribute("aria-label", say[each.dataset.label]);
    for (const each of document.querySelectorAll("[data-lang]")) {
      each.setAttribute("aria-pressed", String(words[each.dataset.lang] === say));
    }
    byId("asking").hidden = Boolean(this.confirmed);
    byId("confirmed").hidden = !this.confirmed;
    byId("confirmed-says").textContent = this.confirmed ? say.confirmed_says(this.confirmed) : "";
    for (const where of Object.keys(FIELDS)) this.show(where);
    this.progress.render();
    this.phone.render();
    this.tick();
  }

  // The two countdowns.
  tick() {
    const { say } = this;
    const now = performance.now();
    const cooling = this.cooling(byId("email").value);
    const left = Math.ceil((this.cooled - now) / 1000);
    const words = this.asking ? say.sending : cooling ? say.wait(left) : this.email ? say.resend : say.send;
    if (byId("send-says").textContent !== words) byId("send-says").textContent = words;
    byId("send").setAttribute("aria-disabled", String(this.asking || cooling));
    const life = byId("life");
    if (this.expiry === null) {
      life.textContent = "";
      return;
    }
    const seconds = Math.max(0, Math.ceil((this.expiry - now) / 1000));
    const clock = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
    life.textContent = seconds ? say.life(clock) : say.expired;
  }
}

new Page();
