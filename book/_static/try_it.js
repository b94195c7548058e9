// "Try it": the time of a decode step by component, from tables that the page holds. Nothing is asked of a server.
(function () {
  "use strict";

  function part(p, b, c) {
    return (p.by_requests ? p.by_requests[b] : 0) + (p.constant || 0) + (p.by_request || 0) * b + (p.by_token || 0) * b * c;
  }

  // Microseconds of one step: b requests with c tokens of context each.
  function step(deployment, sampling, b, c, relative) {
    var parts = deployment.parts.map(function (p) { return { name: p.name, us: part(p, b, c), scale: p.scale }; });
    parts.push({ name: "sampler", us: deployment.sampler[sampling][b] });
    var gpu = parts.reduce(function (sum, p) { return sum + p.us; }, 0);
    var host = deployment.host * b;
    var below = 0, above = 0, scales = {};
    parts.forEach(function (p) { if (p.scale) { scales[p.scale] = (scales[p.scale] || 0) + p.us; } });
    Object.keys(relative || {}).forEach(function (name) {
      below += Math.pow((scales[name] || 0) * (1 - relative[name][0]), 2);
      above += Math.pow((scales[name] || 0) * (relative[name][1] - 1), 2);
    });
    return {
      parts: parts,
      host_us: host,
      step_us: Math.max(gpu, host),
      floor_us: part(deployment.floor, b, c),
      low_us: Math.max(gpu - Math.sqrt(below), host),
      high_us: Math.max(gpu + Math.sqrt(above), host)
    };
  }

  function ready() {
    var form = document.getElementById("try-it"), source = document.getElementById("try-data");
    if (!form || !source) { return; }
    var data = JSON.parse(source.textContent), keys = Object.keys(data.deployments).map(function (k) { return k.split("|"); });
    window.stepcal = { data: data, step: step };
    var fields = {};
    ["model", "gpu", "tp", "sampling", "batch", "context"].forEach(function (n) { fields[n] = document.getElementById("try-" + n); });

    function fill(select, values) {
      var before = select.value;
      select.replaceChildren.apply(select, values.map(function (v) { return new Option(v, v); }));
      select.value = values.indexOf(before) >= 0 ? before : values[0];
    }
    function distinct(values) { return values.filter(function (v, i) { return values.indexOf(v) === i; }); }
    function choices() {
      fill(fields.model, distinct(keys.map(function (k) { return k[0]; })));
      var own = keys.filter(function (k) { return k[0] === fields.model.value; });
      fill(fields.gpu, distinct(own.map(function (k) { return k[1]; })));
      fill(fields.tp, own.filter(function (k) { return k[1] === fields.gpu.value; }).map(function (k) { return k[2]; }));
    }
    function ms(us) { return (us / 1000).toFixed(2) + " ms"; }

    function show() {
      choices();
      var result = document.getElementById("try-result");
      var b = Number(fields.batch.value), c = Number(fields.context.value);
      if (!Number.isInteger(b) || b < 1 || b > data.max_batch || !Number.isInteger(c) || c < 1 || c > 131072) {
        result.textContent = "Requests are a whole number from 1 to " + data.max_batch + ", the context one from 1 to 131072 tokens.";
        return;
      }
      var own = data.deployments[[fields.model.value, fields.gpu.value, fields.tp.value].join("|")];
      var s = step(own, fields.sampling.value, b, c, data.relative), longest = Math.max.apply(null, s.parts.map(function (p) { return p.us; }));
      result.replaceChildren();
      function add(parent, name, text, css) {
        var element = document.createElement(name);
        if (text) { element.textContent = text; }
        if (css) { element.className = css; }
        parent.appendChild(element);
        return element;
      }
      add(result, "p", "One step: " + ms(s.step_us), "try-step");
      add(result, "p", "95% interval of the learned scales: " + ms(s.low_us) + " to " + ms(s.high_us) + ". Floor, bytes over the datasheet's bandwidth: " + ms(s.floor_us) + ". Each request gets " + (1e6 / s.step_us).toFixed(0) + " tokens a second, all together " + (1e6 * b / s.step_us).toFixed(0) + ".");
      var table = add(result, "table", "", "dataframe stepcal-table"), head = add(add(table, "thead"), "tr"), body = add(table, "tbody");
      ["part", "time", "share"].forEach(function (t, i) { add(head, "th", t, i ? "number" : "").scope = "col"; });
      s.parts.forEach(function (p) {
        var row = add(body, "tr"), bar;
        add(row, "th", p.name).scope = "row";
        add(row, "td", ms(p.us), "number");
        bar = add(add(row, "td", "", "try-bar"), "span", (100 * p.us / s.step_us).toFixed(0) + "%");
        bar.style.setProperty("--part", 100 * p.us / longest + "%");
      });
      if (s.host_us >= s.step_us) { add(result, "p", "The scheduler on the CPU sets the pace: " + ms(s.host_us) + "."); }
      if (own.notes.length) {
        add(result, "p", "Extrapolated:", "try-extrapolated");
        var list = add(result, "ul");
        own.notes.forEach(function (n) { add(list, "li", n); });
      }
    }
    form.addEventListener("input", show);
    form.addEventListener("submit", function (event) { event.preventDefault(); });
    show();
  }
  if (document.readyState === "loading") { document.addEventListener("DOMContentLoaded", ready); } else { ready(); }
})();
