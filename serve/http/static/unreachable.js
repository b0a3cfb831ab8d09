// On the SDK's page, which is made by scripts of other servers: where a browser cannot reach them,
// it says so in the place of a circle that turns for ever.
"use strict";

if (!window.sly) {
  const said = document.createElement("p");
  said.setAttribute("role", "alert");
  said.textContent =
    "This page is made by scripts of cdn-public-cloudstore.supervisely.com and cdn.jsdelivr.net, " +
    "which this browser cannot reach. The session works without its page: a model is deployed by " +
    "the Predict App, by api.nn.deploy or by /deploy_from_api.";
  document.getElementById("app-global-loading-icon").replaceWith(said);
}
