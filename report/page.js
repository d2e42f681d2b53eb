"use strict";
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const byId = (id) => document.getElementById(id);
  const SKIPPED = "#d62728";
  const narrow = () => window.innerWidth < 600;

  // Plotly reads a little markup in its texts; what comes from a profile is to show as it is.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const palette = () => css("--palette").split(/\s+/);
  const colour = (n) => palette()[n % palette().length];
  const range = (count) => Array.from({ length: count }, (_, n) => n);
  const finite = (values) => values.filter((value) => Number.isFinite(value));

  function layout(changes) {
    const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true };
    const { xaxis, yaxis, ...rest } = changes;
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: css("--ink"), family: "system-ui, sans-serif", size: narrow() ? 11 : 13 },
      margin: { l: 55, r: 15, t: 25, b: 45 },
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--faint"), activecolor: css("--ink") },
      hovermode: "closest", showlegend: true,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      xaxis: { ...axis, zeroline: false, ...xaxis }, yaxis: { ...axis, zeroline: false, ...yaxis },
      ...rest,
    };
  }

  // Named one by one: by default there is a button that sends the chart to a server.
  const BUTTONS = [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "autoScale2d", "resetScale2d"]];
  const CONFIG = { responsive: true, displaylogo: false, modeBarButtons: BUTTONS, showSendToCloud: false, plotlyServerURL: "" };
  const whole = data.layers > 12 ? {} : { dtick: 1 }; // else there are ticks between layers
  const layerAxis = (changes) => ({ title: { text: "layer (0-based)" }, range: [-0.5, data.layers - 0.5], ...whole, ...changes });
  const pressed = (id) => byId(id).getAttribute("aria-pressed") === "true";
  const region = data.region;
  const hasRegion = region.cold_s < region.cold_e;
  const regionAxis = () => [region.cold_s - 0.5, region.cold_e - 0.5];

  function regionShapes() {
    const rect = (x0, x1, fill) => ({
      type: "rect", xref: "x", yref: "paper", x0: x0 - 0.5, x1: x1 - 0.5, y0: 0, y1: 1,
      fillcolor: css(fill), line: { width: 0 }, layer: "below",
    });
    return [
      rect(0, region.cold_s, "--cold"), rect(region.cold_s, region.cold_e, "--region"),
      rect(region.cold_e, data.layers, "--cold"),
    ];
  }

  // The curve

  function shownCorpora() {
    return new Set([...document.querySelectorAll("#corpora input:checked")].map((box) => Number(box.dataset.corpus)));
  }

  function told(corpus, layer) {
    const at = (name) => corpus[name][layer].toFixed(4);
    return `<b>${plain(corpus.name)}</b>, layer ${layer}<br>mean ${at("mean")}, std ${at("std")}<br>` +
      `q05 ${at("q05")}, q25 ${at("q25")}<br>median ${at("q50")}<br>q75 ${at("q75")}, q95 ${at("q95")}<br>` +
      `min ${at("min")}<br>‖f‖/‖h‖ ${at("norm_ratio_mean")}<br>${corpus.count[layer].toLocaleString("en")} tokens`;
  }

  function saturation() {
    const shown = shownCorpora();
    const band = byId("band").value.split(",").filter(Boolean);
    const layers = range(data.layers);
    const traces = data.corpora.flatMap((corpus, n) => {
      const visible = shown.has(n);
      const common = { x: layers, visible, legendgroup: `c${n}`, showlegend: false };
      const edge = { ...common, mode: "lines", line: { width: 0 }, hoverinfo: "skip" };
      const bands = band.length ? [
        { ...edge, y: corpus[band[0]] },
        { ...edge, y: corpus[band[1]], fill: "tonexty", fillcolor: colour(n) + "30" },
      ] : [];
      return [...bands, {
        ...common, y: corpus.mean, name: plain(corpus.name), meta: { corpus: n }, mode: "lines+markers",
        line: { color: colour(n), width: 2 }, marker: { size: 6, color: colour(n) },
        text: layers.map((layer) => told(corpus, layer)), hovertemplate: "%{text}<extra></extra>",
      }];
    });
    const shapes = regionShapes();
    const annotations = [];
    if (data.threshold !== null) {
      shapes.push({
        type: "line", xref: "paper", x0: 0, x1: 1, y0: data.threshold, y1: data.threshold,
        line: { color: css("--ink"), width: 1.2, dash: "dash" },
      });
      annotations.push({
        xref: "paper", x: 1, xanchor: "right", y: data.threshold, yanchor: "bottom", showarrow: false,
        text: `threshold ${data.threshold.toFixed(6)}`, font: { size: 11 },
      });
    }
    const zoom = pressed("zoom") && hasRegion;
    return [traces, layout({
      shapes, annotations,
      xaxis: layerAxis(zoom ? { range: regionAxis() } : {}),
      yaxis: { title: { text: "cos(h, h + f)" }, ...(zoom ? { range: near(shown, band) } : {}) },
    })];
  }

  /** The range of the curves that are shown, with their bands, within the region. */
  function near(shown, band) {
    const values = data.corpora.filter((_, n) => shown.has(n)).flatMap((corpus) =>
      ["mean", ...band].flatMap((name) => corpus[name].slice(region.cold_s, region.cold_e)));
    if (data.threshold !== null) values.push(data.threshold);
    if (!values.length) return [0, 1];
    const low = Math.min(...values), high = Math.max(...values);
    const margin = 0.08 * Math.max(high - low, 1e-3);
    return [low - margin, high + margin];
  }

  // Distributions

  function histogram() {
    const corpus = data.corpora[Number(byId("histogram-corpus").value)];
    const width = 2 / data.bins;
    const totals = corpus.histogram.map((row) => row.reduce((a, b) => a + b, 0));
    const filled = range(data.bins).filter((bin) => corpus.histogram.some((row) => row[bin] > 0));
    const bins = range(data.bins).slice(filled[0], filled[filled.length - 1] + 1);
    const share = bins.map((bin) => corpus.histogram.map((row, layer) => (totals[layer] ? row[bin] / totals[layer] : 0)));
    const zoom = pressed("histogram-zoom") && hasRegion;
    const inside = zoom ? corpus.q05.slice(region.cold_s, region.cold_e) : [];
    const top = -1 + (bins[bins.length - 1] + 1) * width;
    const low = zoom ? Math.min(...inside, top) - 3 * width : -1 + bins[0] * width;
    return [[{
      type: "heatmap", x: range(data.layers), y: bins.map((bin) => -1 + (bin + 0.5) * width), z: share,
      customdata: bins.map((bin) => corpus.histogram.map((row) => row[bin])),
      text: bins.map((bin) => `${(-1 + bin * width).toFixed(2)} to ${(-1 + (bin + 1) * width).toFixed(2)}`)
        .map((words) => range(data.layers).map(() => words)),
      colorscale: [[0, css("--paper")], [0.15, css("--heat-low")], [0.5, css("--heat")], [1, css("--heat-high")]],
      zmin: 0, zmax: Math.max(...share.flat()), colorbar: { title: { text: "share" }, thickness: 12 },
      hovertemplate: "layer %{x}, cosine %{text}<br>share %{z:.4f}, %{customdata} tokens<extra></extra>",
    }], layout({
      shapes: regionEdges(), showlegend: false,
      xaxis: layerAxis(zoom ? { range: regionAxis() } : {}),
      yaxis: { title: { text: "cosine" }, range: [low, top] },
    })];
  }

  function regionEdges() {
    return !hasRegion ? [] : regionAxis().map((x) => ({
      type: "line", yref: "paper", y0: 0, y1: 1, x0: x, x1: x, line: { color: css("--ink"), width: 1, dash: "dash" },
    }));
  }

  // Operating points

  function points(found) {
    const symbols = ["circle-open", "circle", "diamond", "square", "triangle-up", "x", "star"];
    const traces = found.lines.map((line, n) => ({
      x: found.target, y: line.ratio, name: plain(line.name), mode: "lines+markers",
      line: { color: colour(n), width: 1.5, dash: n ? "solid" : "dot" },
      marker: { symbol: symbols[n % symbols.length], size: 8, color: colour(n) }, customdata: found.threshold,
      hovertemplate: "target %{x:.3f}: %{y:.4f}<br>threshold %{customdata:.6f}<extra>%{fullData.name}</extra>",
    }));
    const most = Math.max(...found.target, ...found.lines.flatMap((line) => finite(line.ratio)));
    traces.push({
      x: [0, most], y: [0, most], name: "as asked", mode: "lines", hoverinfo: "skip",
      line: { color: css("--faint"), width: 1, dash: "dash" },
    });
    const at = found.policy.indexOf(true);
    const shapes = at < 0 ? [] : [{
      type: "line", yref: "paper", y0: 0, y1: 1, x0: found.target[at], x1: found.target[at],
      line: { color: css("--faint"), width: 1, dash: "dot" },
    }];
    const annotations = at < 0 ? [] : [{
      yref: "paper", y: 1, yanchor: "top", x: found.target[at], xanchor: "left", xshift: 3, showarrow: false,
      text: "policy", font: { size: 11 },
    }];
    return [traces, layout({
      shapes, annotations,
      xaxis: { title: { text: "target skip ratio" } }, yaxis: { title: { text: "skip ratio" }, rangemode: "tozero" },
    })];
  }

  function tuning() {
    const all = data.tuning.points;
    const warmUps = new Set(all.map((point) => point.warm_up_tokens)).size;
    const name = (point) => point.line + (warmUps > 1 ? `, warm-up ${point.warm_up_tokens}` : "");
    const traces = [...new Set(all.map(name))].map((line, n) => {
      const own = all.filter((point) => name(point) === line).sort((a, b) => a.skip_ratio_all - b.skip_ratio_all);
      const random = own.every((point) => point.rule === "random");
      const paint = random ? css("--faint") : colour(n);
      return {
        x: own.map((p) => p.skip_ratio_all), y: own.map((p) => p.kl), name: plain(line), mode: "lines+markers",
        line: { color: paint, width: 1.5, dash: random ? "dash" : "solid" },
        marker: { color: paint, size: own.map((p) => (p.on_front ? 9 : 5)) },
        error_y: {
          type: "data", symmetric: false, array: own.map((p) => p.kl_high - p.kl),
          arrayminus: own.map((p) => p.kl - p.kl_low), thickness: 1, width: 3,
        },
        text: own.map((p) => `KL ${p.kl.toFixed(4)} (95 % ${p.kl_low.toFixed(4)} to ${p.kl_high.toFixed(4)})<br>` +
          `excess NLL ${p.excess_nll.toFixed(4)}, ideal speed-up ${p.ideal_speed_up.toFixed(3)}` +
          (p.on_front ? "<br>on the front" : "") + (p.loses_to_random ? "<br>loses to random" : "")),
        hovertemplate: "skip ratio %{x:.3f}<br>%{text}<extra>%{fullData.name}</extra>",
      };
    });
    const chosen = all[data.tuning.chosen];
    traces.push({
      x: [chosen.skip_ratio_all], y: [chosen.kl], name: "chosen", mode: "markers", hoverinfo: "skip",
      marker: { symbol: "circle-open", size: 17, color: css("--ink"), line: { width: 2 } },
    });
    const budget = data.tuning.maxKl;
    const shapes = budget === null ? [] : [{
      type: "line", xref: "paper", x0: 0, x1: 1, y0: budget, y1: budget, line: { color: css("--ink"), width: 1, dash: "dot" },
    }];
    return [traces, layout({
      shapes, xaxis: { title: { text: "skip ratio, all decoded tokens" }, rangemode: "tozero" },
      yaxis: { title: { text: "KL to the full model (nats/token)" }, type: "log", exponentformat: "power" },
    })];
  }

  // Layers

  function perLayer(layers, values, name, n) {
    return {
      x: layers, y: values, name, mode: "lines+markers", line: { color: colour(n), width: 1.5 }, marker: { size: 5 },
      hovertemplate: `layer %{x}<br>${name} %{y:.4f}<extra></extra>`,
    };
  }

  function contribution() {
    const traces = [perLayer(range(data.layers), data.norm, "‖f‖/‖h‖", 0)];
    if (data.influence !== null) traces.push(perLayer(range(data.layers), data.influence, "block influence", 1));
    return [traces, layout({ xaxis: layerAxis(), yaxis: { type: "log", exponentformat: "power", dtick: 1 } })];
  }

  function gate() {
    const { layers, r2, error } = data.gate;
    return [
      [perLayer(layers, r2, "R² of the gate", 2), perLayer(layers, error, "variance of f left by the surrogate", 3)],
      layout({ xaxis: layerAxis(), yaxis: { title: { text: "share of variance" }, rangemode: "tozero" } }),
    ];
  }

  // Tokens

  function tokens() {
    const found = data.tokens;
    const columns = range(found.labels.length), layers = range(data.layers);
    const words = (token, layer) => `token ${token} “${plain(found.labels[token])}”, ${found.parts[token]}<br>layer ${layer}, ` +
      (found.skipped[layer][token] ? "FFN skipped" : "FFN ran");
    const cells = layers.flatMap((layer) => columns.filter((token) => found.skipped[layer][token]).map((token) => [token, layer]));
    const heat = {
      type: "heatmap", x: columns, y: layers, z: found.cosine, zmin: found.from, zmax: 1, colorscale: "Viridis",
      text: layers.map((layer) => columns.map((token) => words(token, layer))),
      hovertemplate: "%{text}<br>cosine of the full model %{z:.4f}<extra></extra>",
      colorbar: { title: { text: "cos(h, h + f)", side: "right" }, thickness: 12, x: 1.01 },
    };
    const marks = {
      x: cells.map((cell) => cell[0]), y: cells.map((cell) => cell[1]), mode: "markers", hoverinfo: "skip",
      marker: { symbol: "square", size: 6, color: SKIPPED, line: { color: "#ffffff", width: 0.6 } },
    };
    const free = found.parts.filter((part) => part !== "decoded").length;
    const edges = found.edges.map((y) => ({
      type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: css("--ink"), width: 1.2, dash: "dash" },
    }));
    const veil = { type: "rect", x0: -0.5, x1: free - 0.5, y0: -0.5, y1: data.layers - 0.5, fillcolor: css("--veil"), line: { width: 0 } };
    const names = [...new Set(found.parts)].map((part, n) => ({
      x: found.parts.indexOf(part) - 0.5, xanchor: "left", yref: "paper", y: 1, yanchor: "bottom", showarrow: false,
      text: part, font: { size: 11 }, yshift: n % 2 ? 13 : 0,
    }));
    return [[heat, marks], layout({
      shapes: [...edges, veil], annotations: names, showlegend: false, margin: { l: 55, r: 15, t: 40, b: 90 },
      xaxis: {
        tickvals: columns, ticktext: found.labels.map(plain), tickangle: -90, tickfont: { size: 10 }, showgrid: false,
        range: [-0.5, columns.length - 0.5],
      },
      yaxis: layerAxis({ showgrid: false }),
    })];
  }

  const charts = {
    saturation, histogram, contribution, gate, tuning, tokens,
    points: () => points(data.points), "gate-points": () => points(data.gatePoints),
  };

  const print = matchMedia("print");

  function draw(...names) {
    for (const name of names) {
      if (!byId(name)) continue;
      const [traces, shape] = charts[name]();
      if (print.matches) shape.width = byId(name).clientWidth; // a printer does not wait to be asked again
      Plotly.react(byId(name), traces, shape, CONFIG);
    }
  }

  function drawAll() {
    for (const swatch of document.querySelectorAll(".swatch")) swatch.style.background = colour(Number(swatch.dataset.colour));
    draw(...Object.keys(charts));
  }

  const toggle = (id, chart) => byId(id).addEventListener("click", () => {
    byId(id).setAttribute("aria-pressed", String(!pressed(id)));
    draw(chart);
  });

  if (!hasRegion) for (const id of ["zoom", "histogram-zoom"]) byId(id).hidden = true;
  toggle("zoom", "saturation");
  toggle("histogram-zoom", "histogram");
  byId("corpora").addEventListener("change", () => draw("saturation"));
  byId("band").addEventListener("change", () => draw("saturation"));
  byId("histogram-corpus").addEventListener("change", () => draw("histogram"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  print.addEventListener("change", () => {
    drawAll();
    if (!print.matches) for (const name of Object.keys(charts)) if (byId(name)) Plotly.Plots.resize(byId(name));
  });
  drawAll();
})();
