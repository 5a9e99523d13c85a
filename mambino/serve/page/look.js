// The theme: what the person chose here before, else the system's. It stands in <head>, so nothing is painted in the
// other one first; Quasar is told as soon as it is there.
window.mambino = {
  dark: matchMedia('(prefers-color-scheme: dark)'),
  isDark() {
    const chosen = localStorage.getItem('mambino-theme');
    return chosen ? chosen === 'dark' : this.dark.matches;
  },
  show() {
    document.documentElement.dataset.theme = this.isDark() ? 'dark' : 'light';
    if (window.Quasar) Quasar.Dark.set(this.isDark());
    window.dispatchEvent(new Event('mambino-theme'));
  },
  toggle() {
    localStorage.setItem('mambino-theme', this.isDark() ? 'light' : 'dark');
    this.show();
  },
};
mambino.show();
mambino.dark.addEventListener('change', () => mambino.show());
window.addEventListener('load', () => {
  mambino.show();
  // on a narrow window the places are a strip: the one that is open is to be seen
  const until = Date.now() + 3000;
  const look = setInterval(() => {
    const here = document.querySelector('.places [aria-current=page]');
    if (here && here.parentElement.scrollWidth > here.parentElement.clientWidth) {
      here.parentElement.scrollLeft = here.offsetLeft - 40;
    }
    if (here || Date.now() > until) clearInterval(look);
  }, 100);
});
