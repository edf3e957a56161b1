//! `/healthz`, `/metrics`, `/v1/openapi.json`: the interface about itself.

use axum::{
    Json,
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use serde::Serialize;
use utoipa::ToSchema;
use wire::Problem;

use crate::{App, extract::Read, failure::Failure, openapi::openapi_json};

/// How the controller does.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct HealthView {
    /// `ok`; `read-only`: nothing can be stored now; or `stopped`: nothing is answered before the controller starts anew.
    status: &'static str,
}

/// Whether all is well: 200, or 503 when nothing can be stored or answered. Why is in the log and the metrics, not told to everybody.
#[utoipa::path(get, path = "/healthz", tag = "system", security(()),
    responses((status = 200, body = HealthView), (status = 503, body = HealthView)))]
pub(crate) async fn health(State(app): State<App>) -> (StatusCode, Json<HealthView>) {
    let health = app.handle.health();
    let (code, status) = match (health.stopped, health.read_only) {
        (true, _) => (StatusCode::SERVICE_UNAVAILABLE, "stopped"),
        (false, Some(_)) => (StatusCode::SERVICE_UNAVAILABLE, "read-only"),
        (false, None) => (StatusCode::OK, "ok"),
    };
    (code, Json(HealthView { status }))
}

/// All figures, in the text format of OpenMetrics: the controller's own, those of the project's VMs, and for a cloud admin those of all
/// VMs, hosts and pools.
#[utoipa::path(get, path = "/metrics", tag = "system",
    responses((status = 200, content_type = "application/openmetrics-text", body = String), (status = "4XX", body = Problem)))]
pub(crate) async fn metrics(State(app): State<App>, Read(asker, _): Read) -> Result<Response, Failure> {
    let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    Ok(([(header::CONTENT_TYPE, kind)], app.handle.metrics(&asker)).into_response())
}

/// This document.
#[utoipa::path(get, path = "/v1/openapi.json", tag = "system", security(()),
    responses((status = 200, content_type = "application/json", body = String)))]
pub(crate) async fn document() -> Response {
    let kind = HeaderValue::from_static("application/json");
    ([(header::CONTENT_TYPE, kind)], openapi_json()).into_response()
}
