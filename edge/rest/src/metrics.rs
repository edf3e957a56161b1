//! `/v1/metrics`: what VMs and hosts use, now and over the last day.

use axum::{Json, extract::State};
use controller::Span;
use model::{
    Timestamp,
    query::Listing,
    telemetry::{HostReading, SeriesView, VmReading},
};
use serde::Deserialize;
use utoipa::IntoParams;
use uuid::Uuid;
use wire::Problem;

use crate::{
    App,
    extract::{Pages, Read, Ref},
    failure::Failure,
};

/// Which part of a list, and how much of the past goes with each item.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Readings {
    /// At most this many items.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<u32>,
    /// The `next` of the page before.
    after: Option<Uuid>,
    /// So many points of the past of each figure, 10 s apart.
    #[serde(default)]
    #[param(minimum = 0, maximum = 60, default = 0)]
    history: u32,
}

impl Readings {
    fn pages(&self) -> Pages {
        Pages::of(self.limit, self.after)
    }
}

/// Which part of a series, and how fine.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Which {
    /// From when, milliseconds since 1970 in UTC; without it, an hour before `until`. At most a day is kept.
    from: Option<i64>,
    /// Until when; without it, now.
    until: Option<i64>,
    /// From one point to the next, seconds: 10, 20, ... 50 within the last hour, whole minutes within the last day.
    #[param(minimum = 10, maximum = 86400)]
    step_s: Option<u32>,
}

impl Which {
    fn span(&self) -> Span {
        Span {
            from: self.from.map(Timestamp),
            until: self.until.map(Timestamp),
            step_s: self.step_s,
        }
    }
}

/// What the project's VMs use now, by id.
#[utoipa::path(get, path = "/v1/metrics/vms", tag = "metrics", params(Readings),
    responses((status = 200, body = Listing<VmReading>), (status = "4XX", body = Problem)))]
pub(crate) async fn vms(
    State(app): State<App>,
    Read(actor, which): Read<Readings>,
) -> Result<Json<Listing<VmReading>>, Failure> {
    let page = which.pages().page()?;
    Ok(Json(app.handle.vm_readings(actor, page, which.history).await?))
}

/// What a VM used, on whatever host it was: at most 1500 points of each figure, the mean of their time each.
#[utoipa::path(get, path = "/v1/metrics/vms/{vm}", tag = "metrics",
    params(("vm" = String, Path, description = "name or id"), Which),
    responses((status = 200, body = SeriesView), (status = "4XX", body = Problem)))]
pub(crate) async fn vm(
    State(app): State<App>,
    Ref(vm): Ref,
    Read(actor, which): Read<Which>,
) -> Result<Json<SeriesView>, Failure> {
    Ok(Json(app.handle.vm_series(actor, vm, which.span()).await?))
}

/// What hosts use now, by id. For cloud admins: it tells of all projects.
#[utoipa::path(get, path = "/v1/metrics/hosts", tag = "metrics", params(Readings),
    responses((status = 200, body = Listing<HostReading>), (status = "4XX", body = Problem)))]
pub(crate) async fn hosts(
    State(app): State<App>,
    Read(actor, which): Read<Readings>,
) -> Result<Json<Listing<HostReading>>, Failure> {
    let page = which.pages().page()?;
    Ok(Json(app.handle.host_readings(actor, page, which.history).await?))
}

/// What a host, its pools and its uplinks used: at most 1500 points of each figure. For cloud admins.
#[utoipa::path(get, path = "/v1/metrics/hosts/{host}", tag = "metrics",
    params(("host" = String, Path, description = "name or id"), Which),
    responses((status = 200, body = SeriesView), (status = "4XX", body = Problem)))]
pub(crate) async fn host(
    State(app): State<App>,
    Ref(host): Ref,
    Read(actor, which): Read<Which>,
) -> Result<Json<SeriesView>, Failure> {
    Ok(Json(app.handle.host_series(actor, host, which.span()).await?))
}
