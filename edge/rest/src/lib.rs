//! The native JSON interface under `/v1`: HTTP in, the controller's handle, HTTP out. It translates and decides nothing.
//!
//! ```text
//!   client ── HTTPS ──▶ guard ──▶ extract ──▶ vms, hosts, templates, ... ──▶ controller::Handle
//!                       Host,     token,      one function an endpoint        submit, read, watch
//!                       Origin    body, query
//!          ◀── JSON, events, or application/problem+json ──
//! ```
//!
//! Invariants:
//! - Every refusal is a `wire::Problem` with a stable code and, where there is one, what to do next; never a bare status.
//! - Nothing but `/v1/join`, `/v1/login`, `/healthz` and the OpenAPI document is answered without a token. A test asks every endpoint
//!   as everybody; one that is not in its table fails the build.
//! - A request is about one project. Of others it is told no more than of what is not there.
//! - Bodies are bounded (1 MiB; blobs by their announced length), strict (no unknown or repeated field) and read in bounded time.
//! - No cookie is read: what a browser sends by itself gives no right. A foreign `Origin` or `Host` is refused beside that.
//! - No state of its own: an answer is the model's serialised form.

mod addressing;
mod audit;
mod blobs;
mod body;
mod console;
mod events;
mod extract;
mod failure;
mod guard;
mod hosts;
mod inventory;
mod metrics;
mod openapi;
mod operations;
mod outcome;
mod people;
mod ports;
mod projects;
mod system;
mod templates;
mod tokens;
mod vms;

use std::{collections::BTreeSet, sync::Arc};

use axum::{Router, extract::DefaultBodyLimit, middleware};
use controller::Handle;

pub use openapi::openapi_json;

/// The header with the version of the program that answers.
pub const VERSION_HEADER: &str = "godwit-version";

/// The header with the project that a request is about, by name or id; without it, the token's own.
pub const PROJECT_HEADER: &str = "godwit-project";

/// The protocol that a console's connection is upgraded to: the guest's serial port, plain bytes both ways.
pub const CONSOLE_PROTOCOL: &str = "godwit-console";

/// What every endpoint has at hand.
#[derive(Clone, Debug)]
pub(crate) struct App {
    pub(crate) handle: Handle,
    /// Names under which this server may be asked, beside `localhost` and plain addresses.
    pub(crate) names: Arc<BTreeSet<String>>,
}

/// The interface of one controller. `names` are the DNS names under which it is reached; a request that was meant for another
/// name is refused (a browser may have been told that name for our address).
pub fn router(handle: Handle, names: &[String]) -> Router {
    let names = names.iter().map(|name| name.to_ascii_lowercase()).collect();
    let app = App {
        handle,
        names: Arc::new(names),
    };
    let (router, _) = openapi::endpoints().split_for_parts();
    router
        .fallback(guard::unknown_path)
        .method_not_allowed_fallback(guard::unknown_method)
        .layer(DefaultBodyLimit::disable())
        .layer(middleware::from_fn_with_state(app.clone(), guard::guard))
        .with_state(app)
}
