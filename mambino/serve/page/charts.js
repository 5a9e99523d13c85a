// Charts of runs. The server sends which curves there are, and then their new points alone; their colours are those of
// the theme, and change with it.
mambino.charts = {
  all: new Map(),                 // component → what it shows
  color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim() || name;
  },
  // spec: {curves: [{name, color, points, dots, faint, dash}], log, x, bars}
  draw(component, spec) {
    if (!component) return;
    this.all.set(component, spec);
    this.paint(component);
  },
  append(component, updates) {
    const spec = this.all.get(component);
    if (!spec) return;
    updates.forEach((points, i) => points.forEach((point) => spec.curves[i].points.push(point)));
    this.paint(component);
  },
  paint(component) {
    const spec = this.all.get(component);
    if (!component.chart) {
      setTimeout(() => this.paint(component), 20);
      return;
    }
    if (component.chart.isDisposed()) {
      this.all.delete(component);
      return;
    }
    const ink = this.color('--ink');
    const muted = this.color('--muted');
    const line = this.color('--line');
    const axis = {
      axisLabel: { color: muted, fontSize: 11, hideOverlap: true },
      axisLine: { lineStyle: { color: line } },
      axisTick: { show: false },
      splitLine: { lineStyle: { color: line } },
    };
    const short = (value) => {
      const size = Math.abs(value);
      if (size >= 1e9) return +(value / 1e9).toPrecision(3) + 'G';
      if (size >= 1e6) return +(value / 1e6).toPrecision(3) + 'M';
      if (size >= 1e4) return +(value / 1e3).toPrecision(3) + 'k';
      return size && size < 1e-3 ? value.toExponential(0) : String(+value.toPrecision(4));
    };
    const named = spec.curves.filter((curve) => !curve.faint);
    const exact = (value) => (typeof value === 'number' ? String(+value.toPrecision(5)) : value);
    const series = spec.curves.map((curve) => ({
      type: spec.bars ? 'bar' : 'line',
      name: curve.name,
      data: spec.log ? curve.points.filter((point) => point[1] > 0) : curve.points,
      showSymbol: !!curve.dots || curve.points.length === 1,
      symbol: 'circle',
      symbolSize: 6,
      sampling: 'lttb',
      silent: !!curve.faint,
      tooltip: { show: !curve.faint },
      lineStyle: { width: curve.faint ? 1 : 2, opacity: curve.faint ? 0.3 : 1, type: curve.dash ? 'dashed' : 'solid' },
      itemStyle: { color: this.color(curve.color), opacity: curve.faint ? 0 : 1, borderRadius: [3, 3, 0, 0] },
      barMaxWidth: 40,
      emphasis: { disabled: true },
    }));
    component.chart.setOption({
      animation: false,
      textStyle: { fontFamily: 'inherit' },
      grid: { left: 8, right: 16, top: named.length > 1 ? 34 : 14, bottom: 4, containLabel: true },
      legend: {
        show: named.length > 1,
        type: 'scroll', top: 0, left: 0, icon: 'roundRect', itemWidth: 14, itemHeight: 4,
        data: named.map((curve) => curve.name),
        textStyle: { color: muted, fontSize: 12 }, pageTextStyle: { color: muted },
      },
      title: {
        show: spec.curves.every((curve) => !curve.points.length), text: 'nothing yet', left: 'center', top: 'middle',
        textStyle: { color: muted, fontSize: 13, fontWeight: 400 },
      },
      tooltip: {
        trigger: 'axis', confine: true, valueFormatter: exact, axisPointer: { lineStyle: { color: muted } },
        backgroundColor: this.color('--sheet'), borderColor: line, textStyle: { color: ink, fontSize: 12 },
      },
      xAxis: spec.bars
        ? { ...axis, type: 'category', splitLine: { show: false } }
        : { ...axis, type: 'value', min: 'dataMin', max: 'dataMax', splitLine: { show: false },
            axisLabel: { ...axis.axisLabel, formatter: short, showMaxLabel: false } },
      yAxis: { ...axis, type: spec.log ? 'log' : 'value', scale: !spec.bars, axisLine: { show: false }, splitNumber: 4,
               axisLabel: { ...axis.axisLabel, formatter: short } },
      series,
    }, true);
    component.$el.dataset.points = spec.curves.reduce((sum, curve) => sum + curve.points.length, 0);
    component.$el.dataset.curves = spec.curves.length;
  },
};
window.addEventListener('mambino-theme', () => {
  for (const component of mambino.charts.all.keys()) mambino.charts.paint(component);
});
