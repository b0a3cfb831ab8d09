// What the platform's own scripts are to the SDK's page, as far as its tests go: the app with its
// state, data, messages and posts, and plain elements for the components that only the platform has.
"use strict";
(() => {
  const text = (name) => `<span v-if="${name}" class="${name}">{{ ${name} }}</span>`;
  const simple = {
    "sly-field": {
      props: ["title", "description"],
      template: `<div class="sly-field"><b><slot name="title">{{ title }}</slot></b>
        <small><slot name="description">{{ description }}</slot></small><slot /></div>`,
    },
    "sly-card": {
      props: ["title", "subtitle", "options", "disabled", "collapsed"],
      data() { return { isFolded: Boolean(this.collapsed) }; },
      watch: { collapsed(value) { this.isFolded = value; } },
      template: `<section class="sly-card" :aria-label="title" :aria-disabled="disabled || null">
        <h2 @click="isFolded = !isFolded">{{ title }}</h2>${text("subtitle")}
        <slot name="header" /><div v-show="!isFolded"><slot /></div></section>`,
    },
    "sly-editor": {
      props: ["value", "options"],
      template: '<div><pre class="sly-editor">{{ value }}</pre><slot name="controls" /></div>',
    },
    "sly-icon": { props: ["options"], template: "<i />" },
    "sly-app-header": { props: ["session", "data", "state"], template: "<header />" },
    "sly-notification-2": {
      props: ["options"],
      template: '<div role="alert"><slot name="title" /><slot /></div>',
    },
    "sly-dropdown-checkbox-selection": { template: "<i />" },
    "sly-html-compiler": {
      props: ["template", "data", "state", "params"],
      render(create) {
        const compiled = Vue.compile(`<span>${this.template}</span>`);
        return compiled.render.call(this, create);
      },
    },
  };
  for (const [name, component] of Object.entries(simple)) Vue.component(name, component);

  Vue.component("sly-app", {
    data: () => ({ state: {}, data: {}, session: null, isReady: false, problems: [] }),
    async created() {
      for (const name of ["session-info", "state", "data"]) {
        const answer = await fetch(`./sly/${name}`, { method: "POST" });
        this[name === "session-info" ? "session" : name] = await answer.json();
      }
      this.isReady = true;
      document.getElementById("app-global-loading-icon").remove();
      const socket = new WebSocket("./sly/ws".replace(".", location.origin.replace("http", "ws")));
      socket.onmessage = ({ data }) => this.take(JSON.parse(data));
      socket.onopen = () => { window.isConnected = true; };
    },
    methods: {
      take(message) {
        for (const field of ["state", "data"]) {
          if (!message[field]) continue;
          const whole = JSON.parse(JSON.stringify(this[field]));
          this[field] = jsonpatch.applyPatch(whole, message[field]).newDocument;
        }
      },
      async post(command, payload = {}) {
        const body = JSON.stringify({ state: this.state, context: {}, payload });
        const headers = { "Content-Type": "application/json" };
        const answer = await fetch(`.${command}`, { method: "POST", headers, body });
        if (answer.ok) return;
        const said = (await answer.json()).detail;
        this.problems.push(said.message || said);
      },
    },
    template: `<main v-if="isReady"><p v-for="one in problems" role="alertdialog">{{ one }}</p>
      <slot v-bind="{ post, state, data, session, isStaticVersion: false }" /></main>`,
  });

  window.sly = { packages: { lodash: window._ } };
  addEventListener("DOMContentLoaded", () => {
    Vue.use(ELEMENT);
    new Vue({ el: "#sly-app" });
  });
})();
