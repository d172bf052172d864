// The page of the service: bundles from a basket, a customer or words; adapters; health. It calls the API beside it and
// nothing else. What comes from outside becomes text nodes only, never markup.

// ---- Words ---------------------------------------------------------------------------------------------------------

const STRINGS = {
  en: {
    "skip": "Skip to content", "views": "Views", "go": "Show bundles", "cancel": "Cancel", "retry": "Try again",
    "tab.bundles": "Bundles", "tab.adapters": "Adapters", "tab.health": "Health",
    "language.other": "中文", "language.label": "Language: 切换到中文",
    "start.legend": "Start from", "mode.basket": "Basket", "mode.user": "Customer", "mode.query": "Words",
    "basket.search": "Add an item", "basket.hint": "Title or item id", "basket.list": "In the basket",
    "basket.none": "No item matches", "customer": "Customer {n}", "user.label": "Customer id", "user.hint": "As your shop writes it",
    "query.label": "What is wanted", "query.hint": "linen outfit for a beach wedding",
    "examples": "Examples", "examples.none": "The catalogue offers none.",
    "budget.label": "Budget", "budget.none": "no limit", "budget.unknown": "prices unknown",
    "excluded.title": "Not wanted", "clear": "Start over",
    "frozen": "encoder without adapter", "compare.switch": "Compare two versions", "compare.a": "Version on side A", "compare.b": "Version on side B",
    "compare.same": "Both sides give the same bundles.",
    "compare.differ": "Of {of} bundles, {same} are the same and {moved} have another rank; {only} are on one side only.",
    "compare.moved": "rank {rank} on {side}",
    "compare.only": "only {side}", "compare.nothing": "No bundle on this side.",
    "compare.building": "Getting the version ready",
    "compare.single": "One version is served. Tune another, or promote one to an arm, to compare.",
    "bundles.title": "Bundles that go together", "bundles.busy": "Composing bundles…",
    "bundles.summary": "{count} bundles by {version}, answered by {by} in {ms} ms",
    "bundles.fallback": "The usual scorers had nothing to say, so this is a fallback: {by}.",
    "by.fusion": "fusion of all scorers", "by.text": "text alone", "by.cf": "collaborative filtering alone",
    "by.popularity": "popularity",
    "empty.title": "Put something into the basket",
    "empty.text": "Add an item, name a customer or say what is wanted. Bundles that go with it appear here at once.",
    "none.title": "No bundle fits", "none.text": "Nothing in the catalogue meets all of it.",
    "none.budget": "Lift the budget", "none.excluded": "Allow what was excluded",
    "bundle": "Bundle {rank}", "bundle.of": "of {budget}", "bundle.unpriced": "price unknown",
    "bundle.budget": "{sum} of a budget of {budget}",
    "item.given": "Your basket", "item.beside": "Goes with it", "item.bundle": "Items", "item.new": "new", "item.add": "Put into the basket: {title}",
    "item.swap": "Swap for something else: {title}", "item.exclude": "Exclude: {title}", "item.remove": "Remove: {title}",
    "item.allow": "Allow again: {title}", "item.added": "Put into the basket: {title}.",
    "item.excluded": "Excluded: {title}.",
    "swap.title": "Instead of this", "swap.take": "Take", "swap.label": "Take {title}", "swap.none": "Nothing else fits its place.",
    "swap.undo": "Undo the swap", "swap.done": "Swapped for {title}.",
    "why.together": "In {count} bundles with {title}", "why.together.one": "In a bundle with {title}",
    "why.related": "{head} {relation} {tail}", "why.required": "required by {title}", "why.it": "it",
    "why.agrees": "shares {traits}", "why.rule": "{percent} of bundles with {given} have {slot}",
    "why.answers": "answers “{names}”", "why.text": "its words fit", "why.cf": "customers choose it alongside",
    "share.title": "What speaks for it", "share.text": "Text {percent}", "share.cf": "Behaviour {percent}",
    "share.rules": "Rules {percent}", "evidence": "Evidence in figures",
    "part.relevance": "Relevance", "part.compatibility": "Compatibility of texts", "part.slots": "Slot rules",
    "part.agreement": "Shared attributes", "part.redundancy": "Redundancy", "part.rules": "Broken rules", "evidence.whole": "The whole bundle",
    "adapters.title": "Adapters",
    "adapters.lead": "Each alias points to a version. Promoting another exchanges adapter, item vectors and index as one, while requests go on.",
    "adapters.none": "No adapter is stored",
    "adapters.none.text": "The frozen encoder answers. Train one with: peft-combo tune --recipe lora-fashion",
    "key.label": "API key", "key.use": "Use key", "key.state": "Kept in this page's memory only, gone when it closes. Promoting needs the scope admin.",
    "key.set": "A key is in use, until this page closes.", "key.enter": "Enter a key",
    "alias.ready": "ready", "alias.waiting": "warming up", "alias.previous": "before: {version}", "alias.job": "{version}: {state}, {stage}",
    "arm.prod": "prod", "arm.next": "next", "arm.shadow": "shadow", "arm.share": "{share} of users",
    "promote.version": "Version", "promote.share": "Share of users", "promote.all": "all at once", "promote.part": "{share}% as canary",
    "promote.do": "Promote", "rollback.do": "Roll back", "promote.title": "Promote {version}?", "rollback.title": "Roll back {alias}?",
    "promote.text": "{alias} moves from {before} to {version} for {share}. Requests under way keep the version they started with.",
    "rollback.text": "{alias} goes back from {before} to {version}.", "rollback.ends": "{version} no longer runs beside {before} in {alias}.", "promote.everyone": "every user", "promote.some": "{share}% of users",
    "promote.done": "{alias} now points to {version}.", "canary.done": "{version} now answers {share}% of the users of {alias}.",
    "rollback.done": "{alias} was rolled back.",
    "versions": "Versions", "version": "Version", "method": "Method", "created": "Stored", "digest": "Digest", "size": "Size",
    "aliases": "Aliases", "quality": "Quality, before → after", "quality.none": "not measured",
    "health.title": "Health", "health.lead": "Figures since the start, {uptime} ago. Read again every 5 seconds.",
    "health.lead.plain": "Read again every 5 seconds.", "not.measured": "not measured", "nothing.yet": "Nothing yet.",
    "figure.requests": "Requests", "figure.errors": "Errors", "figure.p95": "p95, slowest route", "figure.queue": "Queue", "figure.queue.of": "of {limit}",
    "figure.fallbacks": "Fallbacks", "figure.cache": "Cache hits", "figure.batch": "texts a batch: {mean}",
    "figure.memory": "Adapters in memory", "figure.items": "Items", "figure.upserted": "{count} upserted",
    "latency": "Latency by route", "latency.note": "Band: p50 to p95. Mark: p99. ms",
    "live": "p95 while this page is open", "live.note": "{value} ms now, at most {most} ms",
    "answered": "Answered by", "arms": "Arms", "arm": "Arm", "alias": "Alias", "requests": "Requests", "feedback": "Feedback",
    "exposures": "Shown", "drift": "Drift from the reference", "drift.limit": "limit {limit}",
    "drift.query_vectors": "Query vectors, 1 − cosine", "drift.scores": "Scores, in deviations",
    "swaps": "Swaps", "time": "Time", "change": "Change", "result": "Result", "took": "Took",
    "result.promoted": "promoted", "result.split": "takes a share", "result.shadow": "shadow", "result.refused": "refused", "result.rolled back": "rolled back", "result.unloaded": "unloaded",
    "error.title": "That did not work", "error.unreachable": "The service does not answer",
    "error.unreachable.text": "No connection to {host}. Check that peft-combo serve is running.",
    "error.401": "A key is needed. Enter it under Adapters.", "error.403": "This key lacks the scope for it. Use one with the scope admin.",
    "error.429": "The service is busy. Try again in {seconds} s.", "error.request": "Request {id}",
    "days": "{n} d", "hours": "{n} h", "minutes": "{n} min", "seconds": "{n} s",
  },
  zh: {
    "skip": "跳到内容", "views": "页面", "go": "查看组合", "cancel": "取消", "retry": "重试",
    "tab.bundles": "组合推荐", "tab.adapters": "适配器", "tab.health": "运行状况",
    "language.other": "English", "language.label": "语言：Switch to English",
    "start.legend": "从何开始", "mode.basket": "购物篮", "mode.user": "顾客", "mode.query": "描述",
    "basket.search": "添加商品", "basket.hint": "名称或商品编号", "basket.list": "购物篮中",
    "basket.none": "没有匹配的商品", "customer": "顾客 {n}", "user.label": "顾客编号", "user.hint": "与店铺中的写法一致",
    "query.label": "想要什么", "query.hint": "linen outfit for a beach wedding",
    "examples": "示例", "examples.none": "商品目录未提供示例。",
    "budget.label": "预算", "budget.none": "不限", "budget.unknown": "价格未知",
    "excluded.title": "不想要的", "clear": "重新开始",
    "frozen": "未微调的编码器", "compare.switch": "对比两个版本", "compare.a": "A 侧版本", "compare.b": "B 侧版本",
    "compare.same": "两侧给出的组合相同。",
    "compare.differ": "{of} 个组合中，{same} 个相同，{moved} 个排名不同；{only} 个仅出现在一侧。",
    "compare.moved": "在 {side} 侧排第 {rank}",
    "compare.only": "仅 {side}", "compare.nothing": "这一侧没有组合。", "compare.building": "正在准备该版本",
    "compare.single": "目前只有一个版本在服务。再训练一个，或将其上线，即可对比。",
    "bundles.title": "适合搭配的组合", "bundles.busy": "正在生成组合…",
    "bundles.summary": "{count} 个组合，由 {version} 给出，依据{by}，用时 {ms} 毫秒",
    "bundles.fallback": "常规打分器没有结果，此为后备答案：{by}。",
    "by.fusion": "全部打分器融合", "by.text": "仅文本", "by.cf": "仅协同过滤", "by.popularity": "热门程度",
    "empty.title": "先放一件商品进购物篮",
    "empty.text": "添加商品、填写顾客编号或描述需求，与之搭配的组合会立即显示在这里。",
    "none.title": "没有合适的组合", "none.text": "目录中没有同时满足全部条件的商品。",
    "none.budget": "取消预算限制", "none.excluded": "恢复被排除的商品",
    "bundle": "组合 {rank}", "bundle.of": "预算 {budget}", "bundle.unpriced": "价格未知",
    "bundle.budget": "合计 {sum}，预算 {budget}",
    "item.given": "您的购物篮", "item.beside": "与之搭配", "item.bundle": "商品", "item.new": "新", "item.add": "放入购物篮：{title}",
    "item.swap": "换一件：{title}", "item.exclude": "排除：{title}", "item.remove": "移除：{title}",
    "item.allow": "恢复：{title}", "item.added": "已放入购物篮：{title}。", "item.excluded": "已排除：{title}。",
    "swap.title": "可替换为", "swap.take": "选用", "swap.label": "选用 {title}", "swap.none": "没有其他合适的商品。",
    "swap.undo": "撤销替换", "swap.done": "已换成 {title}。",
    "why.together": "与 {title} 同在 {count} 个组合中", "why.together.one": "曾与 {title} 同在一个组合中",
    "why.related": "{head} {relation} {tail}", "why.required": "{title} 需要它", "why.it": "它",
    "why.agrees": "共同点：{traits}", "why.rule": "含 {given} 的组合中 {percent} 也有 {slot}",
    "why.answers": "符合“{names}”", "why.text": "文字描述相符", "why.cf": "顾客常一起选择",
    "share.title": "推荐依据", "share.text": "文本 {percent}", "share.cf": "行为 {percent}",
    "share.rules": "规则 {percent}", "evidence": "详细数据",
    "part.relevance": "相关性", "part.compatibility": "文本相容", "part.slots": "品类规则",
    "part.agreement": "共同属性", "part.redundancy": "重复", "part.rules": "违反规则", "evidence.whole": "整个组合",
    "adapters.title": "适配器",
    "adapters.lead": "每个别名指向一个版本。切换版本时，适配器、商品向量与索引作为整体同时更换，请求不会中断。",
    "adapters.none": "尚无适配器", "adapters.none.text": "目前由未微调的编码器回答。训练命令：peft-combo tune --recipe lora-fashion",
    "key.label": "API 密钥", "key.use": "使用密钥", "key.state": "只保存在本页内存中，关闭即清除。上线操作需要 admin 权限。",
    "key.set": "密钥已启用，关闭本页即失效。", "key.enter": "填写密钥",
    "alias.ready": "就绪", "alias.waiting": "预热中", "alias.previous": "此前：{version}", "alias.job": "{version}：{state}，{stage}",
    "arm.prod": "正式", "arm.next": "灰度", "arm.shadow": "影子", "arm.share": "{share} 的用户",
    "promote.version": "版本", "promote.share": "用户比例", "promote.all": "全部切换", "promote.part": "灰度 {share}%",
    "promote.do": "上线", "rollback.do": "回滚", "promote.title": "上线 {version}？", "rollback.title": "回滚 {alias}？",
    "promote.text": "{alias} 将从 {before} 切换到 {version}，范围：{share}。进行中的请求仍使用原版本。",
    "rollback.text": "{alias} 将从 {before} 退回 {version}。", "rollback.ends": "{alias} 中 {version} 不再与 {before} 并行。", "promote.everyone": "全部用户", "promote.some": "{share}% 的用户",
    "promote.done": "{alias} 现指向 {version}。", "canary.done": "{version} 现服务 {alias} 的 {share}% 用户。",
    "rollback.done": "{alias} 已回滚。",
    "versions": "版本", "version": "版本", "method": "方法", "created": "保存时间", "digest": "摘要", "size": "大小",
    "aliases": "别名", "quality": "质量：之前 → 之后", "quality.none": "未测量",
    "health.title": "运行状况", "health.lead": "自 {uptime}前启动以来的数据，每 5 秒刷新。",
    "health.lead.plain": "每 5 秒刷新。", "not.measured": "未测量", "nothing.yet": "暂无。",
    "figure.requests": "请求数", "figure.errors": "错误", "figure.p95": "最慢路由 p95", "figure.queue": "队列", "figure.queue.of": "上限 {limit}",
    "figure.fallbacks": "后备回答", "figure.cache": "缓存命中", "figure.batch": "每批文本：{mean}",
    "figure.memory": "适配器内存", "figure.items": "商品", "figure.upserted": "新增或更新 {count}",
    "latency": "各路由延迟", "latency.note": "色带：p50 至 p95；标记：p99；单位毫秒",
    "live": "打开本页以来的 p95", "live.note": "当前 {value} 毫秒，最高 {most} 毫秒",
    "answered": "回答来源", "arms": "分组", "arm": "分组", "alias": "别名", "requests": "请求数", "feedback": "反馈",
    "exposures": "展示", "drift": "相对基准的漂移", "drift.limit": "上限 {limit}",
    "drift.query_vectors": "查询向量（1 − 余弦）", "drift.scores": "分数（标准差）",
    "swaps": "切换记录", "time": "时间", "change": "变更", "result": "结果", "took": "用时",
    "result.promoted": "已上线", "result.split": "分流", "result.shadow": "影子", "result.refused": "已拒绝", "result.rolled back": "已回滚", "result.unloaded": "已卸载",
    "error.title": "操作未成功", "error.unreachable": "服务没有响应",
    "error.unreachable.text": "无法连接 {host}。请确认 peft-combo serve 正在运行。",
    "error.401": "需要密钥，请在“适配器”页填写。", "error.403": "该密钥权限不足，请使用带 admin 权限的密钥。",
    "error.429": "服务繁忙，请在 {seconds} 秒后重试。", "error.request": "请求 {id}",
    "days": "{n} 天", "hours": "{n} 小时", "minutes": "{n} 分钟", "seconds": "{n} 秒",
  },
};

let language = remembered("language") ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");

function words(name, values = {}) {
  return STRINGS[language][name].replace(/\{(\w+)\}/g, (_, key) => String(values[key] ?? ""));
}

function remembered(name) {
  try {
    const value = localStorage.getItem(`peft-combo.${name}`);
    return value in STRINGS ? value : null;
  } catch {
    return null; // storage is closed to the page: the browser's language will do
  }
}

function remember(name, value) {
  try {
    localStorage.setItem(`peft-combo.${name}`, value);
  } catch {
    // as above
  }
}

const number = (value, digits = 0) =>
  new Intl.NumberFormat(language, { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);
const percent = (value, digits = 0) =>
  new Intl.NumberFormat(language, { style: "percent", minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);
const price = (value) => number(value, 2);
const known = (value) => value !== null && value !== undefined;

function bytes(value) {
  const unit = value < 1e6 ? ["kB", 1e3] : value < 1e9 ? ["MB", 1e6] : ["GB", 1e9];
  return `${number(value / unit[1], 1)} ${unit[0]}`;
}

function moment(value) {
  const date = new Date(typeof value === "number" ? value * 1000 : value);
  return date.toLocaleString(language, { dateStyle: "medium", timeStyle: "short" });
}

function duration(seconds) {
  for (const [name, size] of [["days", 86400], ["hours", 3600], ["minutes", 60]]) {
    if (seconds >= size) return words(name, { n: Math.floor(seconds / size) });
  }
  return words("seconds", { n: Math.floor(seconds) });
}

// ---- Elements ------------------------------------------------------------------------------------------------------

const find = (id) => document.getElementById(id);

/** Make an element: attributes by name, `on` for listeners, children as nodes or text. */
function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function draw(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (value === true) {
      element.setAttribute(name, "");
    } else if (known(value) && value !== false) {
      element.setAttribute(name, value);
    }
  }
  element.append(...children.flat(Infinity).filter((child) => known(child) && child !== false && child !== ""));
  return element;
}

const ICONS = {
  add: "M12 5v14M5 12h14", remove: "M6 6l12 12M18 6L6 18", swap: "M4 8h14l-4-4M20 16H6l4 4", exclude: "M12 3a9 9 0 1 0 .1 0M5.7 5.7l12.6 12.6",
  top: "M8 4l-5 3 2 4 2-1v10h10V10l2 1 2-4-5-3c-1 2-7 2-8 0z", bottom: "M7 3h10l1 18h-4l-2-11-2 11H6z",
  dress: "M9 3v4l-1 4-3 10h14l-3-10-1-4V3M8 11h8", outerwear: "M9 3L4 6 3 20h4V11M15 3l5 3 1 14h-4V11M9 3l3 4 3-4M7 20h10M12 7v13",
  shoes: "M3 8v9h18c0-3-2-4-5-4.5L11 8c-2 2-6 2-8 0z", bag: "M5 9h14l1 11H4zM9 9V7a3 3 0 0 1 6 0v2",
  accessory: "M12 4l3 5 5 1-4 4 1 6-5-3-5 3 1-6-4-4 5-1z",
};

function icon(name) {
  return draw("svg", { viewBox: "0 0 24 24", class: "line", "aria-hidden": "true" }, draw("path", { d: ICONS[name] }));
}

/** A square that stands for a slot: its drawing, or its first letter. */
function tile(slot) {
  const name = slot ?? "";
  const tone = [...name].reduce((sum, letter) => sum + letter.codePointAt(0), 0) % 6;
  const sign = name in ICONS ? icon(name) : (([...name][0] ?? "·").toUpperCase());
  return make("span", { class: `tile tone-${tone}`, "aria-hidden": "true" }, sign);
}

function action(name, label, listener, more = {}) {
  return make("button", { type: "button", class: "icon", title: label, "aria-label": label, on: { click: listener }, ...more }, icon(name));
}

/** A horizontal bar of parts that add up to at most 1; hidden from readers, for whom the words beside it stand. */
function bar(parts, kind = "bar") {
  let left = 0;
  const pieces = parts.map(([name, share]) => {
    const piece = draw("rect", { class: name, x: `${100 * left}%`, width: `${100 * share}%`, height: "100%" });
    left += share;
    return piece;
  });
  return draw("svg", { class: kind, "aria-hidden": "true" }, pieces);
}

function legend(parts) {
  return make("p", { class: "legend" }, parts.map(([name, text]) => make("span", {}, make("i", { class: name }), text)));
}

function say(text) {
  find("live").textContent = text;
}

// ---- The API -------------------------------------------------------------------------------------------------------

let key = ""; // in memory only
const running = new Map(); // purpose -> AbortController of its latest request

/** What went wrong, as the service says it in problem+json (RFC 9457), or that it did not answer at all. */
class Problem extends Error {
  constructor(status, told = {}, retryAfter = null) {
    super(told.detail ?? told.title ?? words("error.title"));
    this.status = status;
    this.kind = (told.type ?? "").split(":").at(-1);
    this.title = told.title ?? words("error.title");
    this.detail = told.detail;
    this.remedy = told.remedy ?? (status === 429 ? words("error.429", { seconds: retryAfter ?? 1 })
      : status === 401 || status === 403 ? words(`error.${status}`) : null);
    this.requestId = told.request_id;
  }
}

/** Call the API. A later call for the same purpose takes the place of an earlier one, which then gives null. */
async function call(purpose, method, path, body) {
  running.get(purpose)?.abort();
  const control = new AbortController();
  running.set(purpose, control);
  const headers = { Accept: "application/json" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key) headers.Authorization = `Bearer ${key}`;
  try {
    const response = await fetch(path, {
      method, headers, signal: control.signal, credentials: "omit", body: body === undefined ? undefined : JSON.stringify(body),
    });
    const value = await response.json().catch(() => null);
    if (!response.ok) throw new Problem(response.status, value ?? {}, response.headers.get("Retry-After"));
    return value;
  } catch (error) {
    if (control.signal.aborted) return null;
    if (error instanceof Problem) throw error;
    const text = words("error.unreachable.text", { host: location.host });
    throw new Problem(0, { title: words("error.unreachable"), detail: text });
  }
}

function failure(problem, again, ...buttons) {
  if (!(problem instanceof Problem)) throw problem; // a fault of this page belongs into the console
  const needsKey = problem.status === 401;
  return make("div", { class: "state failed", role: "alert" },
    make("h2", {}, problem.title),
    problem.detail && make("p", {}, problem.detail),
    problem.remedy && problem.remedy !== problem.detail && make("p", {}, problem.remedy),
    problem.requestId && make("p", { class: "small mono" }, words("error.request", { id: problem.requestId })),
    make("div", { class: "row" },
      again && make("button", { type: "button", on: { click: again } }, words("retry")),
      needsKey && make("button", { type: "button", on: { click: askForKey } }, words("key.enter")), buttons));
}

function askForKey() {
  location.hash = "adapters";
  setTimeout(() => find("key").focus());
}

// ---- Bundles: what is asked ----------------------------------------------------------------------------------------

const COUNT = 4; // bundles shown
const LAST_STEP = 100; // of the budget's slider; it means no limit

const wanted = { mode: "basket", basket: [], user: "", query: "", excluded: [], budget: null, compare: false };
let dearest = null; // the price at the slider's end
let examples = null;
let shown = new Set(); // ids of the items of the answer on screen
let later = 0; // timer of the next answer
let turn = 0; // number of the latest wish; an answer to an earlier one is not shown

function isEmpty() {
  if (wanted.mode === "user" && wanted.user) return false;
  if (wanted.mode === "query" && wanted.query) return false;
  return wanted.basket.length === 0;
}

function buildRequest(more = {}) {
  const body = { k: COUNT, explain: true, items: wanted.basket.map((item) => item.item_id), ...more };
  if (wanted.mode === "user" && wanted.user) body.user = wanted.user;
  if (wanted.mode === "query" && wanted.query) body.query = wanted.query;
  if (wanted.excluded.length) body.exclude = wanted.excluded.map((item) => item.item_id);
  if (known(wanted.budget)) body.budget = wanted.budget;
  return body;
}

/** Ask anew and show it; soon, so that a slider that moves asks once. */
function refresh(delay = 0) {
  turn += 1;
  if (!isEmpty()) startWaiting();
  clearTimeout(later);
  later = setTimeout(() => (wanted.compare ? compareSides() : showBundles()), delay);
}

async function showBundles() {
  if (isEmpty()) return showEmpty();
  const mine = turn;
  try {
    const answer = await call("compose", "POST", "v1/compose", buildRequest());
    if (answer && mine === turn) showAnswer(answer);
  } catch (problem) {
    if (mine === turn) showProblem(problem);
  }
}

function startWaiting() {
  const place = find("answer");
  place.setAttribute("aria-busy", "true");
  if (place.querySelector(".cards, .sides")) place.classList.add("busy");
  else place.replaceChildren(make("div", { class: "cards" }, [1, 2].map(() => make("div", { class: "card ghost" }))));
  find("summary").textContent = words("bundles.busy");
}

/** Put something in place of the answer, and keep the keyboard where it was, or at the heading. */
function place(...nodes) {
  const area = find("answer");
  const inside = area.contains(document.activeElement);
  area.replaceChildren(...nodes);
  area.classList.remove("busy");
  area.removeAttribute("aria-busy");
  if (inside) find("bundles-title").focus({ preventScroll: true });
}

function showEmpty() {
  running.get("compose")?.abort();
  shown = new Set();
  find("summary").textContent = "";
  place(make("div", { class: "state" }, make("h2", {}, words("empty.title")), make("p", {}, words("empty.text"))));
}

function showNothing() {
  place(make("div", { class: "state" }, make("h2", {}, words("none.title")), make("p", {}, words("none.text")), easings()));
}

/** Buttons that take back what makes an answer impossible. */
function easings() {
  const buttons = [];
  if (known(wanted.budget)) {
    buttons.push(make("button", { type: "button", on: { click: () => setBudget(null) } }, words("none.budget")));
  }
  if (wanted.excluded.length) {
    const lift = () => { wanted.excluded = []; showPicked(); refresh(); };
    buttons.push(make("button", { type: "button", class: "quiet", on: { click: lift } }, words("none.excluded")));
  }
  return buttons;
}

function showProblem(problem) {
  find("summary").textContent = "";
  place(failure(problem, () => refresh(), ...easings()));
}

function showAnswer(answer) {
  const { results, origin } = answer;
  find("summary").textContent = results.length ? words("bundles.summary", {
    count: results.length, version: nameVersion(origin.version), by: words(`by.${origin.answered_by}`), ms: number(answer.took_ms, 1),
  }) : "";
  say(find("summary").textContent || words("none.title"));
  if (!results.length) return showNothing();
  learnPrices(results);
  const before = shown;
  shown = new Set(results.flatMap((bundle) => bundle.items));
  const fresh = new Set([...shown].filter((id) => before.size && !before.has(id) && !inBasket(id)));
  const cards = results.map((bundle, rank) => bundleCard(bundle, rank, { fresh, requestId: answer.request_id }));
  place(fallbackNote(origin), ...notes(answer), make("div", { class: "cards" }, cards));
}

const nameVersion = (version) => (version === FROZEN ? words("frozen") : version);

function fallbackNote(origin) {
  if (!origin.fallbacks?.length) return "";
  return make("p", { class: "verdict" }, words("bundles.fallback", { by: words(`by.${origin.answered_by}`) }));
}

function notes(answer) {
  return (answer.notes ?? []).map((note) => make("p", { class: "verdict small" }, note));
}

// ---- Bundles: a card -----------------------------------------------------------------------------------------------

/** One bundle. Context: `fresh` ids to mark; `side` with `others`, the ids that the other side has at this rank. */
function bundleCard(bundle, rank, context) {
  const card = make("article", { class: "card", "aria-label": words("bundle", { rank: rank + 1 }) });
  const show = (current) => card.replaceChildren(...cardParts(current, rank, context, show, current === bundle ? null : bundle));
  show(bundle);
  return card;
}

function cardParts(bundle, rank, context, show, original) {
  const undo = original && make("button", { type: "button", class: "quiet", on: { click: () => show(original) } }, words("swap.undo"));
  return [
    make("header", {}, make("h2", {}, context.side && sideMark(context.side), words("bundle", { rank: rank + 1 }),
      context.elsewhere && make("span", { class: "tag moved" }, context.elsewhere)), sumOf(bundle)),
    ...budgetMeter(bundle),
    ...itemLists(bundle, context, show),
    ...(undo ? [undo] : []),
    ...shareBar(bundle),
    figures(bundle),
  ];
}

function sumOf(bundle) {
  if (!known(bundle.price)) return make("span", { class: "small" }, words("bundle.unpriced"));
  const of = known(wanted.budget) && make("span", { class: "of" }, ` ${words("bundle.of", { budget: number(wanted.budget) })}`);
  return make("span", { class: "sum number" }, price(bundle.price), of);
}

function budgetMeter(bundle) {
  if (!known(wanted.budget) || !known(bundle.price)) return [];
  const part = wanted.budget > 0 ? bundle.price / wanted.budget : 1;
  const meter = bar([["fill", Math.min(part, 1)]], part > 1 ? "meter over" : "meter");
  const text = words("bundle.budget", { sum: price(bundle.price), budget: number(wanted.budget) });
  return [meter, make("span", { class: "hidden" }, text)];
}

/** What the basket holds in short, then what goes with it, each in the order of the bundle. */
function itemLists(bundle, context, show) {
  const places = bundle.items.map((_, place) => place);
  const given = places.filter((place) => inBasket(bundle.items[place]));
  const added = places.filter((place) => !given.includes(place));
  return [
    given.length > 0 && make("ul", { class: "items given", "aria-label": words("item.given") }, given.map((place) => make("li", {},
      tile(bundle.slots[place]), make("span", { class: "name", title: bundle.titles[place] }, bundle.titles[place]),
      known(bundle.prices?.[place]) && make("span", { class: "number small" }, price(bundle.prices[place]))))),
    make("ul", { class: "items", "aria-label": words(given.length ? "item.beside" : "item.bundle") },
      added.map((place) => itemRow(bundle, place, context, show))),
  ].filter(Boolean);
}

const inBasket = (id) => wanted.basket.some((item) => item.item_id === id);

function itemRow(bundle, place, context, show) {
  const id = bundle.items[place];
  const item = { item_id: id, title: bundle.titles[place], slot: bundle.slots[place], price: bundle.prices?.[place] };
  const only = context.side && !context.others.has(id);
  const row = make("li", { class: `item${only ? ` differs-${context.side}` : ""}`, "data-item": id });
  const toggleSwap = async (event) => {
    const open = row.querySelector(".swaps");
    event.currentTarget.setAttribute("aria-expanded", open ? "false" : "true");
    if (open) open.remove();
    else await offerSwaps(row, bundle, place, context, show);
  };
  row.append(
    tile(item.slot),
    make("div", {},
      make("p", { class: "name" }, item.title),
      make("p", { class: "facts" }, item.slot && make("span", {}, item.slot),
        known(item.price) && make("span", { class: "number" }, price(item.price)),
        context.fresh?.has(id) && make("span", { class: "tag new" }, words("item.new")),
        only && make("span", { class: `tag only-${context.side}` }, words("compare.only", { side: context.side.toUpperCase() })))),
    make("div", { class: "actions" },
      action("add", words("item.add", item), () => addToBasket(item, context.requestId)),
      action("swap", words("item.swap", item), toggleSwap, { "aria-expanded": "false" }),
      action("exclude", words("item.exclude", item), () => exclude(item, context.requestId))),
    whyLine(bundle, id));
  return row;
}

/** The strongest evidence of an item in one line: counts, agreeing attributes, the slot rule. Nothing is made up. */
function whyLine(bundle, id) {
  const told = bundle.evidence.find((entry) => entry.item === id);
  if (!told) return "";
  const titleOf = (other) => shorten(bundle.titles[bundle.items.indexOf(other)] ?? other, 34);
  const reasons = [];
  if (told.answers?.length) {
    reasons.push(words("why.answers", { names: told.answers.map((answer) => answer.named || answer.wish).join(", ") }));
  }
  for (const { relation, with: other, head } of told.related ?? []) {
    const [it, title] = [words("why.it"), titleOf(other)];
    reasons.push(words("why.related", { head: head ? it : title, relation, tail: head ? title : it }));
  }
  if (told.required?.length) reasons.push(words("why.required", { title: titleOf(told.required[0].by) }));
  if (told.together) {
    const { bundles: count, with: other } = told.together;
    reasons.push(words(count === 1 ? "why.together.one" : "why.together", { count, title: titleOf(other) }));
  }
  const traits = Object.values(told.agrees ?? {});
  if (traits.length) reasons.push(words("why.agrees", { traits: traits.slice(0, 3).join(", ") }));
  if (told.rule && reasons.length < 2) {
    const { slot, given, confidence } = told.rule;
    reasons.push(words("why.rule", { slot, given, percent: percent(confidence) }));
  }
  if (!reasons.length) {
    const shares = sumShares([told]);
    reasons.push(words(shares.cf > shares.text ? "why.cf" : "why.text"));
  }
  const line = reasons.join(" · ");
  return make("p", { class: "why" }, line[0].toUpperCase() + line.slice(1));
}

const TEXT_SCORERS = /^(TF-IDF|frozen BERT|tuned BERT|ensemble|tuned by category|text ranker|text)/;

/** The first words of a text, as many as have room. */
function shorten(text, most) {
  if (text.length <= most) return text;
  const end = text.lastIndexOf(" ", most);
  return `${text.slice(0, end > 0 ? end : most).replace(/[\s,;:–-]+$/, "")}…`;
}

/** Split what speaks for items into text, behaviour and rules. What speaks against them (a cost) has no share. */
function sumShares(entries) {
  const sums = { text: 0, cf: 0, rules: 0 };
  for (const told of entries) {
    const scorers = Object.entries(told.scorers ?? {}).filter(([, value]) => value > 0);
    const total = scorers.reduce((sum, [, value]) => sum + value, 0);
    const byText = scorers.filter(([name]) => TEXT_SCORERS.test(name)).reduce((sum, [, value]) => sum + value, 0);
    const textPart = total > 0 ? byText / total : 1; // words alone were asked: their likeness is all there is
    const relevance = Math.max(told.relevance ?? 0, 0);
    sums.text += relevance * textPart + Math.max(told.compatibility ?? 0, 0);
    sums.cf += relevance * (1 - textPart);
    sums.rules += Math.max(told.agreement ?? 0, 0);
  }
  return sums;
}

function shareBar(bundle) {
  const sums = sumShares(bundle.evidence);
  const total = sums.text + sums.cf + sums.rules;
  if (!(total > 0)) return [];
  const parts = Object.entries(sums).map(([name, value]) => [name, value / total]);
  return [make("div", { class: "shares" },
    bar(parts.map(([name, share]) => [`${name}-share`, share])),
    legend(parts.map(([name, share]) => [`${name}-share`, words(`share.${name}`, { percent: percent(share) })])))];
}

function figures(bundle) {
  const pairs = (values, label = (name) => name) => Object.entries(values ?? {}).flatMap(([name, value]) => [
    make("dt", {}, label(name)), make("dd", {}, number(value, 2)),
  ]);
  const partName = (name) => (`part.${name}` in STRINGS.en ? words(`part.${name}`) : name);
  return make("details", {}, make("summary", {}, words("evidence")),
    make("dl", {}, make("dt", { class: "head" }, words("evidence.whole")), pairs(bundle.parts, partName),
      bundle.evidence.map((told) => [
        make("dt", { class: "head" }, bundle.titles[bundle.items.indexOf(told.item)] ?? told.item),
        pairs(told.scorers ?? { relevance: told.relevance ?? 0, compatibility: told.compatibility ?? 0 }, partName),
      ])));
}

// ---- Bundles: what can be done with them -----------------------------------------------------------------------------

function addToBasket(item, requestId) {
  if (!inBasket(item.item_id)) wanted.basket.push(item);
  wanted.excluded = wanted.excluded.filter((one) => one.item_id !== item.item_id);
  if (requestId) tellService(requestId, item, "basket");
  showPicked();
  say(words("item.added", item));
  refresh();
}

function exclude(item, requestId) {
  wanted.excluded.push(item);
  if (requestId) tellService(requestId, item, "rejected");
  showPicked();
  say(words("item.excluded", item));
  refresh();
}

let listens = true; // whether the service takes feedback with the key that is in use

/** Feedback on an answer: it teaches, and nothing waits for it, so a failure is not shown. */
function tellService(requestId, item, kind) {
  if (!listens) return;
  const body = { request_id: requestId, item_id: item.item_id, kind };
  call(`feedback ${item.item_id}`, "POST", "v1/feedback", body).catch((problem) => {
    listens = ![401, 403].includes(problem.status);
  });
}

async function offerSwaps(row, bundle, place, context, show) {
  const panel = make("div", { class: "swaps" }, make("p", { class: "small" }, words("swap.title")));
  row.append(panel);
  const body = buildRequest({ items: bundle.items, swap: bundle.items[place], k: 5, ...(context.adapter && { adapter: context.adapter }) });
  delete body.explain;
  delete body.query;
  try {
    const answer = await call(`swap ${context.side ?? ""}`, "POST", "v1/replace", body);
    if (!answer) return panel.remove();
    const choices = answer.results.map((item) => make("li", {},
      make("span", {}, item.title), known(item.price) && make("span", { class: "number" }, price(item.price)),
      make("button", { type: "button", "aria-label": words("swap.label", item), on: { click: () => {
        show(swapItem(bundle, place, item));
        say(words("swap.done", item));
      } } }, words("swap.take"))));
    panel.append(choices.length ? make("ul", {}, choices) : make("p", {}, words("swap.none")));
  } catch (problem) {
    panel.replaceChildren(failure(problem));
  }
}

/** The bundle with one item in place of another; what was known of the old one goes with it. */
function swapItem(bundle, place, item) {
  const put = (list, value) => list?.map((old, at) => (at === place ? value : old));
  const prices = put(bundle.prices, item.price);
  const evidence = bundle.evidence.filter((entry) => entry.item !== bundle.items[place]);
  const [other, count] = Object.entries(item.together ?? {}).sort((a, b) => b[1] - a[1])[0] ?? [];
  evidence.push({
    item: item.item_id, slot: item.slot, scorers: item.shares, relevance: item.score,
    ...(count > 0 && { together: { with: other, bundles: count } }),
  });
  return {
    ...bundle, items: put(bundle.items, item.item_id), titles: put(bundle.titles, item.title), slots: put(bundle.slots, item.slot ?? ""),
    prices, price: prices?.every(known) ? prices.reduce((sum, one) => sum + one, 0) : null, evidence, parts: {},
  };
}

// ---- Bundles: two versions side by side ------------------------------------------------------------------------------

const BUILD_POLL = 1500; // ms
const BUILD_LOOKS = 80; // then it is asked for again, which tells what is wrong

async function compareSides() {
  if (isEmpty()) return showEmpty();
  const chosen = ["a", "b"].map((side) => find(`side-${side}`).value);
  if (!chosen[0] || !chosen[1]) {
    find("summary").textContent = "";
    return place(make("div", { class: "state" }, make("p", {}, words("compare.single"))));
  }
  const mine = turn;
  startWaiting();
  try {
    const answers = await Promise.all(chosen.map((adapter, n) => call(`side ${n}`, "POST", "v1/compose", buildRequest({ adapter }))));
    if (answers[0] && answers[1] && mine === turn) showSides(answers, chosen);
  } catch (problem) {
    if (mine !== turn) return;
    if (problem.kind === "not-ready") waitForVersion(problem, chosen);
    else showProblem(problem);
  }
}

/** A version that no alias means is built when it is first asked for: wait until the service has it, then ask again. */
function waitForVersion(problem, chosen) {
  find("summary").textContent = "";
  place(make("div", { class: "state", role: "status" }, make("h2", {}, words("compare.building")), make("p", {}, problem.detail)));
  const look = async (left) => {
    const told = await call("sides", "GET", "v1/adapters").catch(() => null);
    const waits = chosen.some((name) => told?.versions.some((version) => version.version === name && !version.comparable));
    if (waits && left > 0) later = setTimeout(look, BUILD_POLL, left - 1);
    else compareSides();
  };
  clearTimeout(later);
  later = setTimeout(look, BUILD_POLL, BUILD_LOOKS);
}

function showSides(answers, chosen) {
  const lists = answers.map((answer) => answer.results);
  lists.forEach(learnPrices);
  shown = new Set(lists.flat().flatMap((bundle) => bundle.items));
  const keys = lists.map((list) => list.map((bundle) => [...bundle.items].sort().join("\n")));
  const ranks = Math.max(lists[0].length, lists[1].length);
  const counts = { same: 0, moved: 0, only: 0 };
  const rows = Array.from({ length: ranks }, (_, rank) => lists.map((list, n) => {
    if (!list[rank]) return make("p", { class: "state" }, words("compare.nothing"));
    const twin = keys[1 - n].indexOf(keys[n][rank]);
    counts[twin === rank ? "same" : twin >= 0 ? "moved" : "only"] += 1;
    // A bundle that the other side has as well is marked by its rank there, any other by what the one beside it lacks.
    const others = new Set(twin >= 0 ? list[rank].items : lists[1 - n][rank]?.items ?? []);
    const elsewhere = twin >= 0 && twin !== rank ? words("compare.moved", { side: "BA"[n], rank: twin + 1 }) : null;
    const context = { side: "ab"[n], others, elsewhere, requestId: answers[n].request_id, adapter: chosen[n] };
    return bundleCard(list[rank], rank, context);
  }));
  const verdict = counts.moved + counts.only === 0 ? words("compare.same")
    : words("compare.differ", { of: ranks, same: counts.same / 2, moved: counts.moved / 2, only: counts.only });
  find("summary").textContent = "";
  say(verdict);
  place(make("p", { class: "verdict", id: "verdict" }, verdict),
    make("div", { class: "sides" }, answers.map((answer, n) => originOf(answer, "ab"[n])), rows.flat()));
}

const sideMark = (side) => make("span", { class: `side side-${side}` }, side.toUpperCase());

function originOf({ origin, took_ms }, side) {
  const text = `${nameVersion(origin.version)} · ${words(`by.${origin.answered_by}`)} · ${number(took_ms, 1)} ms`;
  return make("p", { class: "origin" }, sideMark(side), text,
    make("code", { title: origin.digest }, origin.digest.slice(0, 8)));
}

/** What can be compared: what is served, other versions of the same categories, and the encoder without adapter. */
async function offerSides() {
  const told = await call("sides", "GET", "v1/adapters").catch(() => null);
  if (!told) return;
  const categoryOf = (name) => name.split("@")[0];
  const served = told.aliases.flatMap((alias) => Object.values(alias.arms).map((arm) => arm.version));
  const categories = new Set(told.aliases.map((alias) => categoryOf(alias.alias)));
  const stored = told.versions.map((version) => version.version).filter((name) => categories.has(categoryOf(name)));
  const names = [...new Set([...served, ...stored, FROZEN])];
  ["a", "b"].forEach((side, n) => {
    const select = find(`side-${side}`);
    const before = select.value;
    select.replaceChildren(...names.map((name) => make("option", { value: name }, nameVersion(name))));
    select.value = names.includes(before) ? before : names[n] ?? "";
  });
}

const FROZEN = "frozen"; // what the service calls the encoder without adapter

// ---- Bundles: the panel ----------------------------------------------------------------------------------------------

function showPicked() {
  const row = (item, label, listener) => make("li", { "data-item": item.item_id }, tile(item.slot), make("span", {}, item.title), action("remove", label, listener));
  find("basket").replaceChildren(...wanted.basket.map((item) => row(item, words("item.remove", item), () => {
    wanted.basket = wanted.basket.filter((one) => one !== item);
    showPicked();
    find("item-search").focus();
    refresh();
  })));
  find("excluded").replaceChildren(...wanted.excluded.map((item) => row(item, words("item.allow", item), () => {
    wanted.excluded = wanted.excluded.filter((one) => one !== item);
    showPicked();
    refresh();
  })));
  find("excluded-area").hidden = wanted.excluded.length === 0;
}

function setMode(mode) {
  wanted.mode = mode;
  for (const input of document.querySelectorAll("[name=mode]")) input.checked = input.value === mode;
  for (const part of document.querySelectorAll("[data-mode]")) part.hidden = part.dataset.mode !== mode;
  showExamples();
}

function showExamples() {
  const area = find("examples");
  if (!examples) return area.replaceChildren();
  const begin = (listener) => { shown = new Set(); listener(); refresh(); };
  const chip = (label, listener) => make("button", { type: "button", class: "chip", on: { click: () => begin(listener) } }, label);
  const chips = {
    basket: () => examples.baskets.map(({ items }) => chip(items.map(kindOf).join(" + "), () => takeBasket(items))),
    user: () => examples.users.map(({ user }, n) => chip(words("customer", { n: n + 1 }), () => { wanted.user = find("user").value = user; wanted.basket = []; showPicked(); })),
    query: () => examples.queries.map((query) => chip(query, () => { wanted.query = find("query").value = query; wanted.basket = []; showPicked(); })),
  }[wanted.mode]();
  area.replaceChildren(...(chips.length ? chips.slice(0, 4) : [make("span", { class: "small" }, words("examples.none"))]));
}

/** What an item is, in a word or two: the last name of its category path. */
const kindOf = (item) => item.category?.split(" > ").at(-1) || item.slot || shorten(item.title, 24);

function takeBasket(items) {
  wanted.basket = [...items];
  wanted.excluded = [];
  dearest = null;
  shown = new Set();
  setBudget(null, false);
  showPicked();
}

/** Let the slider end a little above the dearest bundle that was shown without a budget. */
function learnPrices(results) {
  const prices = results.map((bundle) => bundle.price).filter(known);
  if (!known(wanted.budget) && prices.length) dearest = Math.max(dearest ?? 0, 1.1 * Math.max(...prices));
  showBudget();
}

function showBudget() {
  find("budget").disabled = !known(dearest);
  const text = known(wanted.budget) ? number(wanted.budget) : words(known(dearest) ? "budget.none" : "budget.unknown");
  find("budget-value").textContent = text;
  find("budget").setAttribute("aria-valuetext", text);
}

function setBudget(value, ask = true) {
  wanted.budget = value;
  if (!known(value)) find("budget").value = LAST_STEP;
  showBudget();
  if (ask) refresh(120);
}

function readBudget() {
  const step = Number(find("budget").value);
  setBudget(step === LAST_STEP || !known(dearest) ? null : Math.round((step / LAST_STEP) * dearest));
}

function startOver() {
  Object.assign(wanted, { basket: [], user: "", query: "", excluded: [] });
  find("user").value = find("query").value = find("item-search").value = "";
  dearest = null;
  setBudget(null, false);
  setMode("basket");
  showPicked();
  find("item-search").focus();
  refresh();
}

/** The search for items: a combobox with a list, as ARIA's authoring practices have it. */
function setUpSearch() {
  const input = find("item-search");
  const list = find("item-options");
  let options = [];
  let active = -1;
  let timer = 0;
  const close = () => {
    list.hidden = true;
    active = -1;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  };
  const mark = (next) => {
    active = (next + options.length) % options.length;
    [...list.children].forEach((option, at) => option.setAttribute("aria-selected", String(at === active)));
    list.children[active].scrollIntoView({ block: "nearest" });
    input.setAttribute("aria-activedescendant", list.children[active].id);
  };
  const take = (item) => {
    input.value = "";
    close();
    addToBasket(item, null);
  };
  const open = async () => {
    const text = input.value.trim();
    if (!text) return close();
    const answer = await call("search", "GET", `v1/items?limit=8&search=${encodeURIComponent(text)}`).catch(() => null);
    if (!answer || input.value.trim() !== text) return;
    options = answer.results.filter((item) => !inBasket(item.item_id));
    active = -1;
    list.replaceChildren(...options.map((item, at) => make("li", {
      role: "option", id: `item-option-${at}`, "aria-selected": "false",
      on: { mousedown: (event) => event.preventDefault(), click: () => take(item) },
    }, item.title, make("span", { class: "small" }, ` ${item.slot ?? ""} ${known(item.price) ? price(item.price) : ""}`))));
    if (!options.length) list.append(make("li", { class: "small" }, words("basket.none")));
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
  };
  input.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(open, 120); });
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    else if (event.key === "Enter") {
      event.preventDefault();
      if (!list.hidden && options.length) take(options[Math.max(active, 0)]);
    } else if (!list.hidden && options.length && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
      event.preventDefault();
      mark(active + (event.key === "ArrowDown" ? 1 : active < 0 ? 0 : -1));
    }
  });
}

async function loadExamples() {
  try {
    examples = await call("examples", "GET", "v1/examples");
  } catch (problem) {
    if (problem.status === 401) return showProblem(problem);
    examples = null; // the rest of the page does without
  }
  showExamples();
  if (examples?.baskets.length && isEmpty()) takeBasket(examples.baskets[0].items);
  refresh();
}

// ---- Adapters --------------------------------------------------------------------------------------------------------

async function showAdapters() {
  try {
    const told = await call("adapters", "GET", "v1/adapters");
    if (!told) return;
    const none = make("div", { class: "state block" }, make("h2", {}, words("adapters.none")), make("p", {}, words("adapters.none.text")));
    find("aliases").replaceChildren(...told.aliases.map((alias) => aliasCard(alias, told.versions)));
    find("versions").replaceChildren(told.versions.length ? versionTable(told.versions) : none);
  } catch (problem) {
    find("aliases").replaceChildren();
    find("versions").replaceChildren(failure(problem, showAdapters));
  }
}

function aliasCard(alias, versions) {
  const arms = Object.entries(alias.arms);
  const current = alias.arms.prod?.version ?? "";
  const [category] = alias.alias.split("@");
  const others = versions.map((version) => version.version).filter((name) => name.split("@")[0] === category && name !== current);
  return make("article", { class: "card", "data-alias": alias.alias },
    make("header", {}, make("h2", {}, alias.alias),
      make("span", { class: alias.ready ? "tag good" : "tag" }, words(alias.ready ? "alias.ready" : "alias.waiting"))),
    arms.map(([name, arm]) => make("div", { class: "arm" },
      make("span", {}, words(`arm.${name}`)),
      make("div", {}, make("strong", {}, arm.version), " ", make("code", { title: arm.digest }, (arm.digest ?? "").slice(0, 8)),
        bar([["fill", (arm.share ?? 0) / 100]], "meter")),
      make("span", { class: "number" }, percent((arm.share ?? 0) / 100)))),
    alias.previous && make("p", { class: "small" }, words("alias.previous", { version: alias.previous })),
    alias.job?.state === "refused" && make("p", { class: "tag bad" }, alias.job.error ?? words("result.refused")),
    promoteForm(alias, current, others));
}

function promoteForm(alias, current, others) {
  const version = make("select", {}, others.map((name) => make("option", { value: name }, name)));
  const share = make("select", {}, make("option", { value: "100" }, words("promote.all")),
    [5, 10, 25, 50].map((part) => make("option", { value: String(part) }, words("promote.part", { share: part }))));
  const beside = (alias.arms.next ?? alias.arms.shadow)?.version; // a roll-back ends a canary or a shadow first
  const promote = (event) => {
    event.preventDefault();
    changeAlias("promote", alias, current, version.value, Number(share.value));
  };
  return make("form", { class: "promote", on: { submit: promote } },
    make("label", {}, words("promote.version"), version), make("label", {}, words("promote.share"), share),
    make("div", { class: "row" },
      make("button", { disabled: others.length === 0 }, words("promote.do")),
      make("button", { type: "button", class: "quiet", disabled: !beside && !alias.previous, on: {
        click: () => changeAlias("rollback", alias, current, beside ?? alias.previous, 100) } }, words("rollback.do"))));
}

async function changeAlias(verb, alias, before, version, share) {
  const some = words("promote.some", { share });
  const values = { alias: alias.alias, before, version, share: share === 100 ? words("promote.everyone") : some };
  const ends = verb === "rollback" && Object.keys(alias.arms).length > 1;
  const text = words(ends ? "rollback.ends" : `${verb}.text`, values);
  if (!(await confirmed(words(`${verb}.title`, values), text, words(`${verb}.do`)))) return;
  const notice = find("adapters-notice");
  notice.replaceChildren();
  const body = { alias: alias.alias };
  if (verb === "promote") body.version = version;
  if (verb === "promote" && share < 100) body.split = { prod: 100 - share, next: share };
  try {
    await call("change", "POST", `v1/adapters/${verb}`, body);
    const name = verb === "promote" && share < 100 ? "canary.done" : `${verb}.done`;
    await showAdapters();
    notice.replaceChildren(make("span", { class: "verdict" }, words(name, { alias: alias.alias, version, share })));
  } catch (problem) {
    notice.replaceChildren(failure(problem));
  }
}

/** Ask in a dialog; true where it was confirmed. */
function confirmed(title, text, yes) {
  const dialog = find("confirm");
  find("confirm-title").textContent = title;
  find("confirm-text").textContent = text;
  find("confirm-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

function versionTable(versions) {
  const head = ["version", "quality", "method", "created", "size", "digest"];
  const rows = versions.map((version) => make("tr", {},
    make("td", {}, make("strong", {}, version.version), (version.aliases ?? []).map((name) => [" ", make("span", { class: "tag" }, name)])),
    make("td", {}, qualityOf(version.metrics)),
    make("td", {}, version.method ?? ""),
    make("td", {}, version.created ? moment(version.created) : ""),
    make("td", { class: "number" }, known(version.bytes) ? bytes(version.bytes) : ""),
    make("td", {}, make("code", { title: version.digest }, (version.digest ?? "").slice(0, 12)))));
  return make("section", { class: "block" }, make("h2", {}, words("versions")), make("div", { class: "table", tabindex: "0", role: "region", "aria-label": words("versions") },
    make("table", {}, make("thead", {}, make("tr", {}, head.map((name) => make("th", { scope: "col", class: name === "size" ? "number" : null }, words(name))))), make("tbody", {}, rows))));
}

const TOLD_FIRST = ["ndcg@10", "r@10", "mrr", "auc", "f1", "accuracy"];
const LESS_IS_BETTER = /loss|perplexity|error|brier|ece/;

/** The three most telling figures of a version; a gain has its sign and a colour. */
function qualityOf(metrics) {
  const rank = (name) => (TOLD_FIRST.includes(name) ? TOLD_FIRST.indexOf(name) : TOLD_FIRST.length);
  const value = (figure) => (known(figure) && typeof figure === "object" ? figure.value : figure);
  const names = Object.keys(metrics?.after ?? {}).filter((name) => typeof value(metrics.after[name]) === "number");
  if (!names.length) return make("span", { class: "small" }, words("quality.none"));
  return names.sort((a, b) => rank(a) - rank(b)).slice(0, 3).map((name) => {
    const [before, after] = [value(metrics.before?.[name]), value(metrics.after[name])];
    const figure = make("div", { class: "number" }, make("span", { class: "small" }, `${name.toUpperCase()} `));
    if (typeof before !== "number") return fill(figure, {}, [number(after, 3)]);
    const gain = after - before;
    const better = LESS_IS_BETTER.test(name) ? gain < 0 : gain > 0;
    const sign = `${gain < 0 ? "−" : "+"}${number(Math.abs(gain), 3)}`;
    return fill(figure, {}, [`${number(before, 3)} → ${number(after, 3)} `, make("span", { class: better ? "gain" : "loss" }, sign)]);
  });
}

// ---- Health ----------------------------------------------------------------------------------------------------------

const POLL = 5000; // ms
const TRAIL = 60; // readings that the chart has room for
const trail = []; // p95 of each reading while the page is open
let polling = 0;

async function showHealth() {
  clearTimeout(polling);
  if (find("health").hidden) return;
  try {
    const told = document.hidden ? null : await call("status", "GET", "v1/status");
    if (told) drawHealth(told);
  } catch (problem) {
    find("health-body").replaceChildren(failure(problem, showHealth));
  }
  polling = setTimeout(showHealth, POLL);
}

function drawHealth(told) {
  find("health-lead").textContent = known(told.uptime_s)
    ? words("health.lead", { uptime: duration(told.uptime_s) }) : words("health.lead.plain");
  const slowest = Math.max(0, ...(told.routes ?? []).filter(isAnswer).map((route) => route.p95_ms ?? 0));
  trail.push(slowest);
  if (trail.length > TRAIL) trail.shift();
  const block = (name, ...content) => make("section", { class: "block" }, make("h2", {}, words(name)), content);
  const scrolled = window.scrollY;
  find("health-body").replaceChildren(
    tiles(told, slowest),
    make("div", { class: "halves" }, block("latency", latency(told.routes ?? [])), block("live", liveChart())),
    make("div", { class: "halves" }, block("answered", answeredBy(told.answered_by ?? {})), block("drift", driftBars(told.drift ?? []))),
    block("arms", armTable(told.arms ?? [])),
    block("swaps", swapTable(told.swaps ?? [])));
  window.scrollTo(0, scrolled);
}

function tiles(told, slowest) {
  const requests = (told.routes ?? []).reduce((sum, route) => sum + route.count, 0);
  const errors = (told.routes ?? []).reduce((sum, route) => sum + (route.errors ?? 0), 0);
  const total = (counts) => Object.values(counts ?? {}).reduce((sum, count) => sum + count, 0);
  const answers = total(told.answered_by);
  const lookups = (told.cache?.hits ?? 0) + (told.cache?.misses ?? 0);
  const memory = told.memory?.adapters;
  const figure = (name, value, note) => make("div", { class: "card figure" }, make("dt", {}, words(`figure.${name}`)),
    make("dd", {}, known(value) ? value : "–", make("div", { class: "small" }, known(value) ? note ?? "" : words("not.measured"))));
  return make("dl", { class: "tiles" },
    figure("requests", number(requests)),
    figure("errors", requests ? percent(errors / requests, 2) : null),
    figure("p95", slowest ? `${number(slowest, 1)} ms` : null),
    figure("queue", known(told.queue?.depth) ? number(told.queue.depth) : null, known(told.queue?.limit) ? words("figure.queue.of", { limit: number(told.queue.limit) }) : ""),
    figure("fallbacks", answers ? percent(total(told.fallbacks) / answers, 1) : null),
    figure("cache", lookups ? percent(told.cache.hits / lookups) : null, known(told.batch?.mean) ? words("figure.batch", { mean: number(told.batch.mean, 1) }) : ""),
    figure("memory", known(memory) ? bytes(memory) : null),
    figure("items", known(told.items?.catalogue) ? number(told.items.catalogue) : null, words("figure.upserted", { count: number(told.items?.upserted ?? 0) })));
}

function liveChart() {
  const most = Math.max(1, ...trail);
  const points = trail.map((value, at) => `${100 - (100 * (trail.length - 1 - at)) / TRAIL} ${96 - (92 * value) / most}`);
  if (points.length === 1) points.unshift(`98 ${points[0].split(" ")[1]}`); // one reading is a dash
  const line = `M${points.join("L")}`;
  return make("div", { class: "card" },
    make("p", { class: "small" }, words("live.note", { value: number(trail.at(-1), 1), most: number(Math.max(...trail), 1) })),
    draw("svg", { class: "live-chart", viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" },
      draw("path", { class: "area", d: `${line}L100 100L${points[0].split(" ")[0]} 100Z` }), draw("path", { d: line })));
}

/** Whether a route answers customers: neither the page nor what looks after the service. */
const isAnswer = ({ route }) => route.startsWith("/v1/") && !/^.v1.(adapters|status|examples)/.test(route);

function latency(routes) {
  const used = routes.filter((route) => isAnswer(route) && route.count && known(route.p95_ms));
  if (!used.length) return make("p", { class: "small" }, words("nothing.yet"));
  const most = Math.max(...used.map((route) => route.p99_ms ?? route.p95_ms));
  const x = (value) => `${(100 * value) / most}%`;
  return make("div", { class: "card" }, make("p", { class: "small" }, words("latency.note")), make("div", { class: "latency" },
    used.map(({ route, p50_ms: p50, p95_ms: p95, p99_ms: p99 }) => make("div", {},
      make("span", { class: "mono" }, route),
      draw("svg", { "aria-hidden": "true" }, draw("rect", { class: "track", y: "7", width: "100%", height: "2" }),
        draw("rect", { class: "span-95", x: x(p50), y: "3", width: x(Math.max(p95 - p50, 0)), height: "10", rx: "3" }),
        draw("rect", { class: "tick", x: x(p50), y: "1", width: "3", height: "14", rx: "1" }),
        known(p99) && draw("rect", { class: "limit", x: x(0.99 * p99), y: "3", width: "3", height: "10", rx: "1" })),
      make("span", { class: "number" }, [p50, p95, p99].filter(known).map((value) => number(value, 1)).join(" / "))))));
}

const BY = { fusion: "text-share", text: "cf-share", cf: "rules-share", popularity: "rest-share" };

function answeredBy(counts) {
  const total = Object.values(counts).reduce((sum, count) => sum + count, 0);
  if (!total) return make("p", { class: "small" }, words("nothing.yet"));
  const parts = Object.entries(BY).map(([name, tone]) => [name, tone, (counts[name] ?? 0) / total]);
  return make("div", { class: "card" }, bar(parts.map(([, tone, share]) => [tone, share])),
    legend(parts.map(([name, tone, share]) => [tone, `${words(`by.${name}`)} ${percent(share, 1)}`])));
}

function armTable(arms) {
  if (!arms.length) return make("p", { class: "small" }, words("nothing.yet"));
  const rate = (arm) => (arm.exposures ? percent((arm.feedback ?? 0) / arm.exposures, 1) : "–");
  return dataTable(["alias", "arm", "version", "requests", "exposures", "feedback"], arms.map((arm) => [
    arm.alias, words(`arm.${arm.arm}`), arm.version, number(arm.requests ?? 0), known(arm.exposures) ? number(arm.exposures) : "–", rate(arm),
  ]), 3, words("arms"));
}

function swapTable(swaps) {
  if (!swaps.length) return make("p", { class: "small" }, words("nothing.yet"));
  return dataTable(["time", "alias", "change", "result", "took"], swaps.map((swap) => {
    const tag = make("span", { class: `tag ${swap.result === "promoted" ? "good" : swap.result === "refused" ? "bad" : ""}`, title: swap.error ?? "" }, words(`result.${swap.result}`));
    return [moment(swap.time), swap.alias, `${swap.from ?? "–"} → ${swap.to}`, tag, `${number(swap.took_ms ?? 0, 2)} ms`];
  }), 4, words("swaps"));
}

function dataTable(head, rows, firstNumber, label) {
  const kind = (at) => ({ class: at >= firstNumber ? "number" : null });
  return make("div", { class: "table", tabindex: "0", role: "region", "aria-label": label }, make("table", {},
    make("thead", {}, make("tr", {}, head.map((name, at) => make("th", { scope: "col", ...kind(at) }, words(name))))),
    make("tbody", {}, rows.map((row) => make("tr", {}, row.map((cell, at) => make("td", kind(at), cell)))))));
}

function driftBars(drift) {
  const measured = drift.filter((one) => known(one.value));
  if (!measured.length) return make("p", { class: "small" }, words("not.measured"));
  const most = Math.max(...measured.map((one) => Math.max(one.value, one.limit ?? 0))) * 1.1 || 1;
  return make("div", { class: "card" }, make("div", { class: "latency" }, measured.map(({ of, value, limit }) => make("div", {},
    make("span", {}, `drift.${of}` in STRINGS.en ? words(`drift.${of}`) : of),
    draw("svg", { "aria-hidden": "true" }, draw("rect", { class: "track", y: "7", width: "100%", height: "2" }),
      draw("rect", { class: known(limit) && value > limit ? "limit" : "tick", y: "3", width: `${(100 * value) / most}%`, height: "10", rx: "3" }),
      known(limit) && draw("rect", { class: "limit", x: `${(100 * limit) / most}%`, width: "2", height: "16" })),
    make("span", { class: "number" }, number(value, 3), known(limit) ? ` · ${words("drift.limit", { limit: number(limit, 3) })}` : "")))));
}

// ---- The frame -------------------------------------------------------------------------------------------------------

const VIEWS = ["bundles", "adapters", "health"];

function showView() {
  const name = VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "bundles";
  for (const view of VIEWS) find(view).hidden = view !== name;
  for (const link of document.querySelectorAll(".tabs a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (name === "adapters") showAdapters();
  if (name === "health") showHealth();
}

/** Put the words of the chosen language everywhere, then draw what is on screen again. */
function showWords() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = words(element.dataset.text);
  for (const element of document.querySelectorAll("[data-label]")) element.setAttribute("aria-label", words(element.dataset.label));
  for (const element of document.querySelectorAll("[data-hint]")) element.setAttribute("placeholder", words(element.dataset.hint));
  find("language").textContent = words("language.other");
  find("language").lang = language === "zh" ? "en" : "zh";
  find("key-state").textContent = words(key ? "key.set" : "key.state");
  showPicked();
  showExamples();
  showBudget();
}

function start() {
  showWords();
  setUpSearch();
  find("language").addEventListener("click", () => {
    language = language === "zh" ? "en" : "zh";
    remember("language", language);
    showWords();
    showView();
    refresh();
  });
  find("start").addEventListener("change", (event) => {
    if (event.target.name === "mode") { setMode(event.target.value); refresh(); }
  });
  find("start").addEventListener("submit", (event) => {
    event.preventDefault();
    shown = new Set();
    wanted.user = find("user").value.trim();
    wanted.query = find("query").value.trim();
    refresh();
  });
  find("query").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); find("start").requestSubmit(); }
  });
  find("budget").addEventListener("input", readBudget);
  find("compare").addEventListener("change", async (event) => {
    wanted.compare = event.target.checked;
    find("compare-choice").hidden = !wanted.compare;
    if (wanted.compare) await offerSides();
    refresh();
  });
  for (const side of ["side-a", "side-b"]) find(side).addEventListener("change", () => refresh());
  find("clear").addEventListener("click", startOver);
  find("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key = find("key").value.trim();
    listens = true;
    find("key").value = "";
    find("key-state").textContent = words(key ? "key.set" : "key.state");
    find("adapters-notice").replaceChildren();
    showAdapters();
    loadExamples();
  });
  window.addEventListener("hashchange", () => { showView(); find(`${document.querySelector(".tabs [aria-current]").hash.slice(1)}-title`).focus(); });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) showHealth(); });
  showView();
  loadExamples();
}

start();
