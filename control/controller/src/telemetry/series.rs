//! What people read of what hosts and VMs use: the last figures of many, and a day of one.

use std::{collections::BTreeMap, sync::Arc};

use model::{
    Actor, HostId, Refusal, Role, Timestamp,
    name::Reference,
    query::{HostView, Listing, Page, Query, View, VmView},
    refusal::Code,
    telemetry::{HostReading, PartSeries, Reading, SeriesView, VmReading},
};

use super::{
    Store,
    columns::{Kind, NOTHING, Row, Subject},
    lock,
    ring::{self, Step},
    seconds,
};
use crate::handle::{Handle, needs};

/// Most points of a series in one answer: a day of minutes, and some more.
const POINTS_MAX: u64 = 1500;
/// Most points of the history that goes with a reading.
const HISTORY_MAX: u32 = 60;
/// What is kept, seconds.
const DAY_S: u64 = 24 * 3600;
const HOUR_S: u64 = 3600;

/// Which part of a series, and how fine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Span {
    /// From when; without it, an hour before `until`.
    pub from: Option<Timestamp>,
    /// Until when; without it, now.
    pub until: Option<Timestamp>,
    /// From one point to the next, seconds: a multiple of 10 below a minute, of 60 from there on. Without it, the finest that is kept.
    pub step_s: Option<u32>,
}

/// A span as it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    step: Step,
    from_s: u64,
    step_s: u64,
    points: u64,
    next_s: Option<u64>,
}

impl Handle {
    /// What a page of the project's VMs uses now, each with its last `history` points.
    ///
    /// # Errors
    /// As [`Handle::read`]'s, and for too much history.
    pub async fn vm_readings(&self, actor: Actor, page: Page, history: u32) -> Result<Listing<VmReading>, Refusal> {
        check_history(history)?;
        let View::Vms(Listing { items, next }) = self.read(actor, Query::Vms(page)).await? else {
            return Err(unexpected());
        };
        let now = self.now();
        self.telemetry_of(move |store| {
            let items = items
                .into_iter()
                .map(|vm| vm_reading(store, vm, history, now))
                .collect();
            Ok(Listing { items, next })
        })
        .await
    }

    /// What a page of hosts uses now, each with its last `history` points. For cloud admins: it tells of all projects.
    ///
    /// # Errors
    /// As [`Handle::read`]'s, and for too much history.
    pub async fn host_readings(&self, actor: Actor, page: Page, history: u32) -> Result<Listing<HostReading>, Refusal> {
        needs(&actor, Role::CloudAdmin)?;
        check_history(history)?;
        let View::Hosts(Listing { items, next }) = self.read(actor, Query::Hosts(page)).await? else {
            return Err(unexpected());
        };
        let now = self.now();
        self.telemetry_of(move |store| {
            let items = items
                .into_iter()
                .map(|host| host_reading(store, host, history, now))
                .collect();
            Ok(Listing { items, next })
        })
        .await
    }

    /// What a VM used: on whatever host it was.
    ///
    /// # Errors
    /// When there is no such VM in the actor's project, or the span makes no sense.
    pub async fn vm_series(&self, actor: Actor, vm: Reference, span: Span) -> Result<SeriesView, Refusal> {
        let View::Vm(vm) = self.read(actor, Query::Vm(vm)).await? else {
            return Err(unexpected());
        };
        let plan = Plan::of(span, seconds(self.now()))?;
        self.telemetry_of(move |store| {
            let parts = vec![store.part(Kind::Vm, vm.name.as_str(), Subject::vm(vm.id), plan)?];
            Ok(plan.view(vm.id.0, vm.name, parts))
        })
        .await
    }

    /// What a host, its pools and its uplinks used. For cloud admins.
    ///
    /// # Errors
    /// When there is no such host, or the span makes no sense.
    pub async fn host_series(&self, actor: Actor, host: Reference, span: Span) -> Result<SeriesView, Refusal> {
        needs(&actor, Role::CloudAdmin)?;
        let View::Host(view) = self.read(actor, Query::Host(host)).await? else {
            return Err(unexpected());
        };
        let plan = Plan::of(span, seconds(self.now()))?;
        self.telemetry_of(move |store| {
            let host = view.host;
            let mut parts = vec![store.part(Kind::Host, host.name.as_str(), Subject::host(host.id), plan)?];
            for kind in [Kind::Pool, Kind::Uplink] {
                for (subject, label) in store.parts_of(kind, host.id) {
                    parts.push(store.part(kind, &label, subject, plan)?);
                }
            }
            Ok(plan.view(host.id.0, host.name, parts))
        })
        .await
    }

    /// Reads what is kept, off the runtime's own threads.
    async fn telemetry_of<T, F>(&self, read: F) -> Result<T, Refusal>
    where
        T: Send + 'static,
        F: FnOnce(&Store) -> Result<T, Refusal> + Send + 'static,
    {
        let store = Arc::clone(&self.0.telemetry);
        let reading = tokio::task::spawn_blocking(move || read(&store)).await;
        reading.map_err(|_| Refusal::new(Code::Other, "reading the figures broke off"))?
    }
}

fn unexpected() -> Refusal {
    Refusal::new(Code::Other, "the controller answered something else than was asked")
}

fn check_history(history: u32) -> Result<(), Refusal> {
    if history <= HISTORY_MAX {
        return Ok(());
    }
    let message = format!("history is {history}; a reading goes with at most {HISTORY_MAX} points");
    Err(Refusal::new(Code::InvalidInput, message).hint("ask for the series of one thing: /v1/metrics/vms/{vm}"))
}

fn vm_reading(store: &Store, vm: VmView, history: u32, now: Timestamp) -> VmReading {
    let host = vm.status.host;
    VmReading {
        id: vm.id,
        name: vm.name,
        host: vm.host,
        state: vm.status.state,
        vcpus: vm.spec.vcpus,
        memory_size_bytes: vm.spec.memory_mib.saturating_mul(1 << 20),
        reading: store.reading(Kind::Vm, host, Subject::vm(vm.id), history, now),
    }
}

fn host_reading(store: &Store, view: HostView, history: u32, now: Timestamp) -> HostReading {
    let host = view.host;
    let facts = host.status.facts.as_ref();
    HostReading {
        id: host.id,
        connected: view.connected,
        cpus: facts.map_or(0, |facts| facts.cpus),
        memory_size_bytes: facts.map_or(0, |facts| facts.memory_mib.saturating_mul(1 << 20)),
        vms: view.vms,
        reading: store.reading(Kind::Host, Some(host.id), Subject::host(host.id), history, now),
        name: host.name,
    }
}

impl Store {
    fn reading(&self, kind: Kind, host: Option<HostId>, subject: Subject, history: u32, now: Timestamp) -> Reading {
        let mut reading = Reading::default();
        if let Some((at, row)) = host.and_then(|host| self.last(host, subject)) {
            reading.at = Some(at);
            let figures = kind.columns().iter().zip(row).filter(|(_, figure)| !figure.is_nan());
            reading.figures = figures.map(|(name, figure)| ((*name).to_owned(), figure)).collect();
        }
        if history > 0 {
            let rows = self.history(subject, u64::from(history), now);
            reading.history = named(kind, &rows);
        }
        reading
    }

    /// A thing's row of its host's last look.
    pub(super) fn last(&self, host: HostId, subject: Subject) -> Option<(Timestamp, Row)> {
        let looks = self.looks();
        let look = looks.get(&host).filter(|look| look.came.elapsed() < super::FRESH)?;
        look.rows.get(&subject).map(|row| (look.at, *row))
    }

    /// The last `count` rows. The span that passes now counts once it was measured.
    pub(super) fn history(&self, subject: Subject, count: u64, now: Timestamp) -> Vec<Row> {
        let passing = seconds(now) / Step::Fine.seconds();
        let Some(ring) = &self.ring else { return vec![] };
        let first = passing.saturating_sub(count);
        // What cannot be read is not known.
        let mut rows = lock(ring)
            .read(subject, Step::Fine, first, count + 1)
            .unwrap_or_default();
        if rows.last().is_some_and(|row| row.iter().all(|figure| figure.is_nan())) {
            rows.pop();
        } else if !rows.is_empty() {
            rows.remove(0);
        }
        rows
    }

    fn part(&self, kind: Kind, name: &str, subject: Subject, plan: Plan) -> Result<PartSeries, Refusal> {
        let ring = self.ring.as_ref().ok_or_else(|| unreadable("it could not be opened"))?;
        let each = plan.step_s / plan.step.seconds();
        let first = plan.from_s / plan.step.seconds();
        let rows = lock(ring).read(subject, plan.step, first, plan.points * each);
        let mut rows = rows.map_err(|error| unreadable(&error.to_string()))?;
        rows.resize(usize::try_from(plan.points * each).unwrap_or(0), NOTHING);
        let each = usize::try_from(each).unwrap_or(1).max(1);
        let points: Vec<Row> = rows.chunks(each).map(ring::mean).collect();
        Ok(PartSeries {
            kind: kind.name().to_owned(),
            name: name.to_owned(),
            series: named(kind, &points),
        })
    }

    pub(super) fn parts_of(&self, kind: Kind, host: HostId) -> Vec<(Subject, String)> {
        let (first, last) = Subject::parts(kind, host);
        let found = self.ring.as_ref().map(|ring| lock(ring).between(first, last));
        let mut found = found.unwrap_or_default();
        // A host that renames its links again and again fills no answer.
        found.truncate(model::Telemetry::PARTS_MAX);
        found
    }
}

fn unreadable(why: &str) -> Refusal {
    Refusal::new(Code::Other, format!("the file of figures cannot be read: {why}"))
        .hint("the controller's log says more; what is used now is still told")
}

/// Columns by their names.
fn named(kind: Kind, rows: &[Row]) -> BTreeMap<String, Vec<Option<f32>>> {
    let columns = kind.columns().iter().enumerate();
    columns
        .map(|(column, name)| {
            let points = rows
                .iter()
                .map(|row| Some(row[column]).filter(|figure| !figure.is_nan()));
            ((*name).to_owned(), points.collect())
        })
        .collect()
}

impl Plan {
    fn of(span: Span, now_s: u64) -> Result<Self, Refusal> {
        let refuse = |message: String, hint: &str| Err(Refusal::new(Code::InvalidInput, message).hint(hint));
        let until = span.until.map_or(now_s, seconds).min(now_s);
        let from = span.from.map_or(until.saturating_sub(HOUR_S), seconds);
        if from >= until {
            let message = "`from` is not before `until`, or both are still to come".to_owned();
            return refuse(message, "give milliseconds since 1970, the earlier first");
        }
        let recent = from >= now_s.saturating_sub(HOUR_S);
        let step_s = span.step_s.map_or(if recent { 10 } else { 60 }, u64::from);
        let sane = match step_s {
            0 => false,
            1..60 => step_s.is_multiple_of(Step::Fine.seconds()),
            60..=DAY_S => step_s.is_multiple_of(Step::Coarse.seconds()),
            _ => false,
        };
        if !sane {
            let message = format!("step_s is {step_s}: points are not kept so");
            return refuse(
                message,
                "take 10, 20, ... 50, or whole minutes up to a day: 60, 300, 3600",
            );
        }
        let (step, kept) = if step_s < 60 {
            (Step::Fine, HOUR_S)
        } else {
            (Step::Coarse, DAY_S)
        };
        // What is older is not kept so finely; the answer says where it begins.
        let oldest = now_s.saturating_sub(kept) / step_s * step_s + step_s;
        let from_s = (from / step_s * step_s).max(oldest);
        let end_s = until.div_ceil(step_s) * step_s;
        let points = end_s.saturating_sub(from_s) / step_s;
        let page = points.min(POINTS_MAX);
        Ok(Self {
            step,
            from_s,
            step_s,
            points: page,
            next_s: (page < points).then_some(from_s + page * step_s),
        })
    }

    fn view(self, id: uuid::Uuid, name: model::Name, parts: Vec<PartSeries>) -> SeriesView {
        let at = |s: u64| Timestamp(i64::try_from(s.saturating_mul(1000)).unwrap_or(i64::MAX));
        SeriesView {
            id,
            name,
            from: at(self.from_s),
            until: at(self.from_s + self.points * self.step_s),
            step_s: u32::try_from(self.step_s).unwrap_or(u32::MAX),
            parts,
            next: self.next_s.map(at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_000_000;

    fn at(s: u64) -> Option<Timestamp> {
        Some(Timestamp(i64::try_from(s * 1000).unwrap()))
    }

    fn plan(from: Option<u64>, until: Option<u64>, step_s: Option<u32>) -> Result<Plan, Refusal> {
        let span = Span {
            from: from.and_then(at),
            until: until.and_then(at),
            step_s,
        };
        Plan::of(span, NOW)
    }

    #[test]
    fn without_a_word_it_is_the_last_hour_in_tens_of_seconds() {
        let made = plan(None, None, None).unwrap();
        assert_eq!((made.step, made.step_s, made.next_s), (Step::Fine, 10, None));
        assert!((359..=360).contains(&made.points), "{made:?}");
        assert!(made.from_s + made.points * 10 >= NOW);
    }

    #[test]
    fn a_day_is_minutes_and_what_is_older_than_what_is_kept_is_left_out() {
        let made = plan(Some(1), None, None).unwrap();
        assert_eq!((made.step, made.step_s), (Step::Coarse, 60));
        assert!(made.points <= 1440 && made.from_s >= NOW - DAY_S, "{made:?}");
        let fine = plan(Some(NOW - DAY_S), None, Some(10)).unwrap();
        assert!(fine.from_s >= NOW - HOUR_S && fine.points <= 361);
        let gone = plan(Some(10), Some(20), Some(60)).unwrap();
        assert_eq!(gone.points, 0);
    }

    #[test]
    fn steps_that_are_not_kept_and_spans_that_are_none_are_refused() {
        for step in [0, 1, 15, 61, 90, 86_460, u32::MAX] {
            assert_eq!(
                plan(None, None, Some(step)).unwrap_err().code,
                Code::InvalidInput,
                "{step}"
            );
        }
        for (from, until) in [
            (Some(NOW), None),
            (Some(NOW - 5), Some(NOW - 10)),
            (Some(NOW + 5), Some(NOW + 10)),
        ] {
            assert!(plan(from, until, None).is_err(), "{from:?} {until:?}");
        }
        let negative = Span {
            from: Some(Timestamp(i64::MIN)),
            until: Some(Timestamp(-5)),
            step_s: None,
        };
        assert!(Plan::of(negative, NOW).is_err());
    }
}
