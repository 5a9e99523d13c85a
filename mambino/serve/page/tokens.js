// A text token by token: what a token is, how likely it was and what else could have stood there is seen when
// the pointer or the keyboard is on it. All that comes from a model is put in as text alone.
//
// A token is {t: its text, n: its nats, s: how it is shown, a: [[how another is shown, its nats], …], h: its heat from
// -1 to 1, f: true where a hole was}; all but t may be missing.

const SEEN = { '\n': '↵\n', '\t': '⇥' };
const POPPED = 12;      // pixels between a token and what is said of it

function percent(nats) {
  const p = 100 * Math.exp(-nats);
  return p >= 10 ? p.toFixed(0) + ' %' : p >= 0.1 ? p.toFixed(1) + ' %' : p >= 0.001 ? p.toFixed(3) + ' %' : '< 0.001 %';
}

function make(tag, name, text) {
  const element = document.createElement(tag);
  element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}

export default {
  template: '<div class="tokens" role="group" :aria-label="label" ref="text"></div>',
  props: { label: String, marks: Boolean },
  mounted() {
    this.told = new WeakMap();
    this.pop = make('div', 'pop');
    this.pop.setAttribute('role', 'tooltip');
    this.pop.hidden = true;
    document.body.append(this.pop);
    const text = this.$refs.text;
    text.addEventListener('pointerover', (event) => this.show(event.target));
    text.addEventListener('pointerleave', () => this.hide());
    text.addEventListener('focusin', (event) => this.show(event.target));
    text.addEventListener('focusout', () => this.hide());
    text.addEventListener('keydown', (event) => this.go(event));
    window.addEventListener('scroll', this.hide, true);
  },
  unmounted() {
    window.removeEventListener('scroll', this.hide, true);
    this.pop.remove();
  },
  methods: {
    add(tokens) {
      const text = this.$refs.text;
      for (const token of tokens) text.append(this.span(token));
      // the tab key stops once in a text, at a token; the arrows go on from there
      if (!text.querySelector('[tabindex="0"]')) text.querySelector('.token')?.setAttribute('tabindex', '0');
    },
    span(token) {
      if (token.n === undefined && !token.a) return make('span', token.f ? 'found' : 'said', token.t);
      const span = make('span', 'token');
      span.textContent = this.marks ? token.t.replace(/[\n\t]/g, (sign) => SEEN[sign]) : token.t;
      span.tabIndex = -1;
      span.setAttribute('role', 'button');
      span.setAttribute('aria-label', `${token.s ?? token.t}, ${token.n.toFixed(2)} nats, ${percent(token.n)}`);
      span.dataset.nats = token.n;
      if (token.h !== undefined) {
        span.style.setProperty('--h', Math.min(1, Math.abs(token.h)).toFixed(3));
        span.dataset.level = Math.sign(token.h) * Math.min(4, Math.floor(Math.abs(token.h) * 5));
        span.classList.add(token.h < 0 ? 'cold' : 'hot');
      }
      this.told.set(span, token);
      return span;
    },
    clear() {
      this.$refs.text.replaceChildren();
      this.hide();
    },
    go(event) {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === 'Escape') this.hide();
      if (!step || !event.target.classList.contains('token')) return;
      event.preventDefault();
      let next = event.target;
      do next = step > 0 ? next.nextElementSibling : next.previousElementSibling;
      while (next && !next.classList.contains('token'));
      if (!next) return;
      event.target.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    },
    show(span) {
      const token = this.told.get(span);
      if (!token) return this.hide();
      this.pop.replaceChildren();
      const head = make('div', 'head');
      head.append(make('span', 'mono', token.s ?? token.t), make('span', 'figure', `${token.n.toFixed(2)} nats · ${percent(token.n)}`));
      this.pop.append(head);
      if (token.d) this.pop.append(make('div', 'muted small', token.d));
      for (const [shown, nats] of token.a ?? []) {
        const row = make('div', 'other' + (shown === token.s ? ' own' : ''));
        row.style.setProperty('--p', Math.exp(-nats));
        row.append(make('span', 'mono', shown), make('span', 'figure', percent(nats)));
        this.pop.append(row);
      }
      this.pop.hidden = false;
      const place = span.getClientRects()[0] ?? span.getBoundingClientRect();
      const size = this.pop.getBoundingClientRect();
      const left = Math.max(8, Math.min(place.left, document.documentElement.clientWidth - size.width - 8));
      const under = place.bottom + POPPED / 2;
      const fits = under + size.height < window.innerHeight;
      this.pop.style.left = `${left}px`;
      this.pop.style.top = `${fits ? under : Math.max(8, place.top - POPPED / 2 - size.height)}px`;
    },
    hide() {
      this.pop.hidden = true;
    },
  },
};
