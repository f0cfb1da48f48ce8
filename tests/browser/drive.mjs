// Drives the demo page: node drive.mjs URL SCENARIO OPTIONS, the last one JSON. Prints what it found, as JSON.
// It uses the page as a person would; the test asserts what must hold.

import { mkdirSync } from "node:fs";
import { chromium } from "playwright-core";

const [url, scenario, options] = process.argv.slice(2);
const { chromium: program, email, scheme = "light", lang = "en-US", width = 1280, shots = "", key = "" } = JSON.parse(options);
const TIMEOUT = 20_000; // ms

const browser = await chromium.launch({
  executablePath: program,
  args: [
    ...["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"],
    ...["--disable-background-networking", "--disable-component-update", "--disable-sync"],
  ],
});
const context = await browser.newContext({ viewport: { width, height: 800 }, colorScheme: scheme, locale: lang });
const page = await context.newPage();
page.setDefaultTimeout(TIMEOUT);
const troubles = [];
page.on("pageerror", (error) => troubles.push(error.message));
// The browser also logs each error status that the API answers; that is not a fault of the page.
page.on("console", (line) => line.type() === "error" && !/status of [45]/.test(line.text()) && troubles.push(line.text()));

const text = (selector) => page.locator(selector).innerText();
const says = (where, tone) => page.locator(`#${where}-says[data-tone=${tone}]`).waitFor();
const ended = () => page.locator("[data-stage=reply]:is([data-state=good], [data-state=bad], [data-state=stuck])").waitFor();
const inMail = async () => (await page.frameLocator("#mail-html").locator(".code").innerText()).trim();
const other = (code) => (code.startsWith("1") ? "2" : "1") + code.slice(1);

const ask = async () => {
  await page.locator("#email").fill(email);
  await page.locator("#send").click();
};

const seen = async (name) => {
  const stages = await page.locator("[data-stage]").evaluateAll((all) =>
    all.map((each) => ({
      name: each.dataset.stage,
      state: each.dataset.state,
      time: each.querySelector(".time").textContent,
    })),
  );
  const layout = await page.evaluate(() => ({
    wide: document.documentElement.scrollWidth,
    lang: document.documentElement.lang,
    title: document.title,
    ground: getComputedStyle(document.body).backgroundColor,
    focus: document.activeElement?.id ?? "",
  }));
  if (shots) {
    mkdirSync(shots, { recursive: true });
    await page.screenshot({ path: `${shots}/${name}-${lang.slice(0, 2)}-${scheme}-${width}.png`, fullPage: true });
  }
  return {
    ...layout,
    stages,
    caption: await text("#progress-caption"),
    language: await page.locator("#mail-subject").textContent(),
    ask: await page.locator("#ask-says").textContent(),
    check: await page.locator("#check-says").textContent(),
  };
};

const scenarios = {
  // Ask, read the mail on the phone, type a wrong code, then the right one.
  async signup() {
    const start = await seen("start");
    await ask();
    await says("ask", "good");
    const code = await inMail();
    await ended();
    const sent = await seen("sent");
    const cooling = await text("#send");
    const life = await text("#life");
    await page.locator("#code").fill(other(code));
    await page.locator("#confirm").click();
    await says("check", "bad");
    const wrong = await seen("wrong");
    await page.locator("#code").fill(code);
    await page.locator("#confirm").click();
    await page.locator("#confirmed").waitFor();
    return { start, sent, cooling, life, wrong, confirmed: await text("#confirmed"), end: await seen("confirmed") };
  },

  // The same with nothing but a keyboard.
  async keyboard() {
    const path = [];
    const tab = async (wanted) => {
      for (let i = 0; i < 20; i += 1) {
        await page.keyboard.press("Tab");
        const [id, outline] = await page.evaluate(() => {
          const { outlineStyle, boxShadow } = getComputedStyle(document.activeElement);
          return [document.activeElement.id, outlineStyle !== "none" || boxShadow !== "none"];
        });
        path.push({ id, outline });
        if (id === wanted) return;
      }
      throw new Error(`Tab does not lead to ${wanted}: ${JSON.stringify(path)}`);
    };
    await tab("email");
    await page.keyboard.type(email);
    await page.keyboard.press("Enter");
    await says("ask", "good");
    const code = await inMail();
    const waiting = await page.evaluate(() => document.activeElement.id);
    await page.keyboard.type(code);
    await page.keyboard.press("Enter");
    await page.locator("#confirmed").waitFor();
    const confirmed = await page.evaluate(() => document.activeElement.id);
    await tab("again");
    await page.keyboard.press("Enter");
    const again = await page.evaluate(() => document.activeElement.id);
    await tab("back");
    await page.keyboard.press("Enter");
    await page.locator("#list").waitFor();
    const row = await page.evaluate(() => document.activeElement.dataset.id ?? "");
    await page.keyboard.press("Enter");
    await page.locator("#mail").waitFor();
    return { path, waiting, confirmed, again, row };
  },

  // Ask, and see where it stays.
  async stuck() {
    await ask();
    await page.locator("[data-stage][data-state=stuck][aria-current=step]").waitFor();
    return { stuck: await seen("stuck"), ...(await scenarios.late()) };
  },

  // Wait for an answer of 6.
  async late() {
    if (scenario === "late") await ask();
    await says("ask", "late");
    await ended();
    return { late: await seen("late") };
  },

  // A wrong code until there is none, then a new one in full-width digits.
  async attempts() {
    await ask();
    await says("ask", "good");
    const code = await inMail();
    const tries = [];
    while (tries.length < 6) {
      await page.locator("#code").fill(other(code));
      const [answer] = await Promise.all([
        page.waitForResponse(/check_varifycode/).then((response) => response.json()),
        page.locator("#confirm").click(),
      ]);
      await says("check", "bad");
      tries.push(answer.error);
    }
    const dropped = { ...(await seen("dropped")), life: await text("#life"), send: await text("#send") };
    await page.locator("#send:not([aria-disabled=true])").click();
    await says("ask", "good");
    await page.locator("#life:not(:empty)").waitFor();
    await page.frameLocator("#mail-html").locator(`.code:not(:text("${code}"))`).waitFor();
    const wide = (await inMail()).replace(/\d/g, (digit) => String.fromCharCode(0xff10 + Number(digit)));
    await page.locator("#code").fill(wide);
    await page.locator("#confirm").click();
    await page.locator("#confirmed").waitFor();
    return { tries, dropped, wide };
  },

  // A code of as many digits as there can be.
  async grown() {
    await ask();
    await says("ask", "good");
    const code = await inMail();
    const field = page.locator("#code");
    await field.fill(code);
    const hidden = {}; // pixels of the code that the field cannot show, by the width of the page
    for (const wide of [320, 360, 480, 721, 800, 900, 1000, 1100, 1280]) {
      await page.setViewportSize({ width: wide, height: 800 });
      hidden[wide] = await field.evaluate((input) => input.scrollWidth - input.clientWidth);
    }
    await page.locator("#confirm").click();
    await page.locator("#confirmed").waitFor();
    return { code, hidden };
  },

  async refused() {
    await ask();
    await says("ask", "bad");
    await ended();
    return { refused: await seen("refused") };
  },

  async key() {
    await page.locator("#key-form").waitFor();
    await page.locator("#key").fill(other(key));
    await page.locator("#key").press("Enter");
    await says("key", "bad");
    const wrong = { ...(await seen("key")), key: await text("#key-says"), inbox: await text("#empty-says") };
    await page.locator("#key").fill(key);
    await page.locator("#key").press("Enter");
    await page.locator("#key-form").waitFor({ state: "hidden" });
    await ask();
    await says("ask", "good");
    return { wrong, code: await inMail(), metrics: await page.locator("#metrics").isVisible() };
  },

  // Both languages say all there is to say.
  async words() {
    return await page.evaluate(async () => {
      const { words } = await import("/page/words.js");
      const paths = (of, at = "") =>
        Object.entries(of).flatMap(([name, value]) =>
          typeof value === "object" ? paths(value, `${at}${name}.`) : [`${at}${name}:${typeof value}`],
        );
      const wanted = [...document.querySelectorAll("[data-say]")].map((each) => each.dataset.say);
      wanted.push(...[...document.querySelectorAll("[data-label]")].map((each) => each.dataset.label));
      await document.querySelector("[data-lang=zh]").click();
      const chinese = document.querySelector("h1").textContent;
      await document.querySelector("[data-lang=en]").click();
      return { en: paths(words.en), zh: paths(words.zh), wanted, chinese, english: document.querySelector("h1").textContent };
    });
  },
};

try {
  await page.goto(url);
  await page.locator(key ? "#key-form" : "#empty-says:not(:empty), #mails > li").first().waitFor({ state: "attached" });
  const found = await scenarios[scenario]();
  console.log(JSON.stringify({ ...found, troubles }));
} finally {
  await browser.close();
}
