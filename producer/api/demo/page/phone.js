// The inbox as a phone shows it: a list, or one mail. Reads it once a second while the page is visible.

import * as requests from "./requests.js";

const LOOK = 1000; // ms
const byId = (id) => document.getElementById(id);

export class Phone {
  constructor(page) {
    this.page = page;
    this.mails = [];
    this.opened = null; // the open mail
    this.expected = null; // { email, known }: the next mail to this address opens by itself
    this.trouble = "";
    byId("banner").addEventListener("click", () => this.reveal());
    new IntersectionObserver(([entry]) => this.see(entry.isIntersecting), { threshold: 0.3 }).observe(byId("phone"));
    byId("back").addEventListener("click", () => this.close());
    document.addEventListener("visibilitychange", () => this.look());
    this.render();
    this.clock();
    setInterval(() => this.clock(), 5000);
  }

  start() {
    this.timer ??= setInterval(() => this.look(), LOOK);
    return this.look();
  }

  // A code was requested: open its mail once it arrives.
  expect(email) {
    const address = email.trim();
    byId("banner").hidden = true;
    this.expected = { email: address, known: new Set(this.mails.map((each) => each.id)) };
    if (this.opened && !this.opened.to.includes(address)) this.close(false);
    this.render();
  }

  relax() {
    this.expected = null;
    this.render();
  }

  async look() {
    if (document.hidden || this.looking || !this.page.facts?.inbox) return;
    this.looking = true;
    try {
      this.mails = await requests.mails();
      this.trouble = "";
      const { email, known } = this.expected ?? {};
      const fresh = this.expected && this.mails.find((each) => !known.has(each.id) && each.to.includes(email));
      if (fresh) {
        await this.open(fresh.id, false);
        this.expected = null;
        byId("arrived").textContent = byId("banner-says").textContent = this.page.say.arrived(fresh.subject);
        byId("banner").hidden = this.seen;
        this.page.arrived(email);
      }
    } catch (error) {
      if (!(error instanceof requests.Refused)) throw error;
      this.trouble = error.why === 401 ? "locked" : "inbox_away";
    } finally {
      this.looking = false;
    }
    this.render();
  }

  async open(id, byHand) {
    const mail = await requests.mail(id);
    this.opened = mail;
    // A new frame for each mail: Chromium leaves a frame blank that navigates while it is hidden. Nor does a new frame
    // add to the history of the page.
    const frame = byId("mail-html").cloneNode();
    if (mail.view) frame.src = `/page/mail/${mail.view}`;
    else frame.removeAttribute("src");
    byId("mail-html").replaceWith(frame);
    const text = byId("mail-text");
    frame.hidden = !mail.view;
    text.hidden = Boolean(mail.view);
    text.textContent = mail.view ? "" : mail.text;
    byId("mail").hidden = true; // shown again, it slides in
    void byId("mail").offsetWidth;
    this.render();
    if (byHand) byId("mail-subject").focus();
  }

  see(seen) {
    this.seen = seen;
    if (seen) byId("banner").hidden = true;
  }

  reveal() {
    byId("phone").scrollIntoView({ block: "center" });
    byId("mail-subject").focus({ preventScroll: true });
  }

  close(byHand = true) {
    const id = this.opened?.id;
    this.opened = null;
    this.render();
    if (byHand) document.querySelector(`#mails [data-id="${id}"]`)?.focus();
  }

  render() {
    const { say, facts } = this.page;
    byId("list").hidden = this.opened !== null;
    byId("mail").hidden = this.opened === null;
    byId("empty").hidden = this.mails.length > 0;
    byId("empty").toggleAttribute("data-coming", this.expected !== null);
    const usual = !facts ? "" : !facts.inbox ? "no_inbox" : this.expected ? "coming" : "empty";
    byId("empty-says").textContent = say[this.trouble || usual] ?? "";
    this.rows(say);
    if (this.opened) {
      const { from, to, subject, at } = this.opened;
      const name = from.name || from.address;
      byId("mail-subject").textContent = subject;
      byId("mail-from").textContent = name;
      byId("mail-to").textContent = say.to(to.join(", "));
      byId("mail-at").textContent = this.time(at);
      byId("mail-html").title = say.mail;
      document.querySelector(".from .face").textContent = name.slice(0, 1);
    }
  }

  rows(say) {
    const list = byId("mails");
    const shown = this.mails.map((each) => each.id).join() + say.tag;
    if (list.dataset.shown === shown) return; // keeps the focus
    list.dataset.shown = shown;
    list.replaceChildren(...this.mails.map((each) => this.row(each, say)));
  }

  row({ id, from, to, subject, at }, say) {
    const part = (tag, kind, text) => Object.assign(document.createElement(tag), { className: kind, textContent: text });
    const button = part("button", "", "");
    button.type = "button";
    button.dataset.id = id;
    const face = part("span", "face", (from.name || from.address).slice(0, 1));
    face.setAttribute("aria-hidden", "true");
    button.append(
      face,
      part("b", "", from.name || from.address),
      part("span", "when", this.time(at)),
      part("span", "subject", subject),
      part("span", "to", say.to(to.join(", "))),
    );
    button.addEventListener("click", () => this.open(id, true).catch(() => this.look()));
    const item = document.createElement("li");
    item.append(button);
    return item;
  }

  time(at) {
    const date = new Date(at);
    return Number.isNaN(date.getTime()) ? "" : date.toLocaleTimeString(this.page.say.tag, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
  }

  clock() {
    byId("clock").textContent = this.time(Date.now());
  }
}
