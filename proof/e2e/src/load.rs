//! The load from outside: an open loop of HTTP requests at a fixed rate, each
//! with one second and one chance, and what became of every one of them.

use crate::http::Connection;
use crate::probe::{enter_netns, real_time};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::Ipv4Addr;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior};

/// A request that has no answer after this is lost.
const LIMIT: Duration = Duration::from_secs(1);
/// Connections that are opened before the first request and used in turn. A connection that is begun while the guest stands for a
/// moment would be measured as lost whatever the guest does: Linux repeats a lost SYN after 1 s (RFC 6298, 2), which is the limit.
/// The guest takes 128.
const CONNECTIONS: usize = 32;
/// Between two answers: the guest stands, or nobody hears it.
const SILENCE: Duration = Duration::from_millis(100);
/// Reasons of losses kept for the report.
const REASONS_MAX: usize = 10;

/// What became of the requests. Latencies count from the moment a request was
/// due, so that a client that was held up does not hide what it did not send.
#[derive(Clone, Debug, Default, Serialize)]
pub struct LoadReport {
    /// Requests that were due.
    pub sent: u64,
    /// Requests without a right answer within a second.
    pub lost: u64,
    /// Answers whose counter stood still or fell: another copy of the guest, or its past.
    pub counter_faults: u64,
    /// Median latency, ms.
    pub p50_ms: f64,
    /// 99th percentile, ms.
    pub p99_ms: f64,
    /// Longest latency, ms.
    pub max_ms: f64,
    /// Longest time between two answers in a row, ms.
    pub silence_ms: f64,
    /// Lost requests that were due while others were answered: no standstill explains them.
    pub lost_in_between: u64,
    /// Why requests were lost, and how many for each reason; of more reasons than can be told, only how many.
    pub reasons: BTreeMap<String, u64>,
    /// Answers by latency: the count of those in `[2^(i-1), 2^i)` ms at place i.
    pub histogram: Vec<u64>,
}

impl LoadReport {
    /// No request was lost, and one guest answered; or, where the guest `stands` while it is copied, none but those that were due in a standstill.
    ///
    /// # Errors
    /// What is not so.
    pub fn holds(&self, stands: bool) -> Result<()> {
        if self.counter_faults > 0 {
            bail!(
                "the guest's counter stood still or fell {} times: two guests, or an old one",
                self.counter_faults
            );
        }
        let lost = if stands { self.lost_in_between } else { self.lost };
        if lost > 0 {
            bail!(
                "{lost} of {} requests were lost ({} in all), longest silence {:.0} ms: {:?}",
                self.sent,
                self.lost,
                self.silence_ms,
                self.reasons
            );
        }
        Ok(())
    }
}

/// A running load.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    lost: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<LoadReport>>>,
}

impl Load {
    /// Starts `rate` requests a second of `GET /status` to `ip` from the
    /// network namespace at `netns`.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(netns: &Path, ip: Ipv4Addr, rate: u32) -> Result<Load> {
        let stop = Arc::new(AtomicBool::new(false));
        let lost = Arc::new(AtomicU64::new(0));
        let (netns, stopped, losing) = (netns.to_owned(), stop.clone(), lost.clone());
        let body = move || {
            enter_netns(&netns)?;
            real_time();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .context("cannot start the load")?;
            let client = Rc::new(Client {
                ip,
                lost: losing,
                ..Client::new(ip)
            });
            tokio::task::LocalSet::new().block_on(&runtime, client.run(rate, &stopped))
        };
        let thread = thread::Builder::new()
            .name("load".into())
            .spawn(body)
            .context("cannot start the load")?;
        Ok(Load {
            stop,
            lost,
            thread: Some(thread),
        })
    }

    /// Requests lost so far.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Stops sending, waits for the answers that are still due, and reports.
    ///
    /// # Errors
    /// When the client could not run at all.
    pub fn finish(mut self) -> Result<LoadReport> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(report)) => report,
            _ => bail!("the load's thread panicked"),
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Debug)]
struct Client {
    ip: Ipv4Addr,
    lost: Arc<AtomicU64>,
    /// The one that was used the longest ago first: none is idle for so long that the guest closes it.
    idle: RefCell<VecDeque<Connection>>,
    tally: RefCell<Tally>,
}

#[derive(Debug, Default)]
struct Tally {
    sent: u64,
    latencies_ms: Vec<f64>,
    reasons: BTreeMap<String, u64>,
    /// Counters of answers that no other request can still precede.
    seen: BTreeSet<u64>,
    /// Highest counter of a finished request.
    highest: u64,
    counter_faults: u64,
    /// When the last answer came.
    answered: Option<Instant>,
    /// From an answer to the next, where that took long.
    silences: Vec<(Instant, Instant)>,
    /// When those that were lost were due.
    lost: Vec<Instant>,
}

impl Client {
    fn new(ip: Ipv4Addr) -> Client {
        Client {
            ip,
            lost: Arc::default(),
            idle: RefCell::default(),
            tally: RefCell::default(),
        }
    }

    async fn run(self: Rc<Self>, rate: u32, stop: &AtomicBool) -> Result<LoadReport> {
        for _ in 0..CONNECTIONS {
            // A guest that is not there shows in the requests.
            let Ok(Ok(connection)) = tokio::time::timeout(LIMIT, Connection::open(self.ip)).await else {
                break;
            };
            self.idle.borrow_mut().push_back(connection);
        }
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / rate.max(1));
        // Open loop: what was missed is sent late, and its lateness counts.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let mut requests = tokio::task::JoinSet::new();
        while !stop.load(Ordering::Relaxed) {
            let due = ticks.tick().await;
            let client = self.clone();
            requests.spawn_local(async move { client.one(due).await });
            while requests.try_join_next().is_some() {}
        }
        while requests.join_next().await.is_some() {}
        Ok(self.tally.borrow().report(self.lost.load(Ordering::Relaxed)))
    }

    async fn one(&self, due: Instant) {
        let floor = {
            let mut tally = self.tally.borrow_mut();
            tally.sent += 1;
            tally.highest
        };
        let connected = Cell::new(false);
        let answered = match tokio::time::timeout_at(due + LIMIT, self.ask(&connected)).await {
            Ok(answered) => answered,
            Err(_) => {
                let what = if connected.get() { "answer" } else { "connection" };
                Err(anyhow::anyhow!("no {what} within {} ms", LIMIT.as_millis()))
            }
        };
        let latency_ms = due.elapsed().as_secs_f64() * 1e3;
        let mut tally = self.tally.borrow_mut();
        match answered {
            Ok(counter) => {
                tally.heard(Instant::now());
                tally.answer(latency_ms, counter, floor);
            }
            Err(error) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
                tally.lost.push(due);
                tally.lost_for(format!("{error:#}"));
            }
        }
    }

    async fn ask(&self, connected: &Cell<bool>) -> Result<u64> {
        let idle = self.idle.borrow_mut().pop_front();
        let mut connection = match idle {
            Some(connection) => connection,
            None => Connection::open(self.ip).await?,
        };
        connected.set(true);
        let answer = connection.ask("GET", "/status").await?;
        if answer.status != 200 {
            bail!("status {}", answer.status);
        }
        if answer.keep_alive {
            self.idle.borrow_mut().push_back(connection);
        }
        let status: serde_json::Value = serde_json::from_slice(&answer.body).context("the answer is not JSON")?;
        status["counter"].as_u64().context("the answer has no counter")
    }
}

impl Tally {
    /// An answer came at this time.
    fn heard(&mut self, at: Instant) {
        let before = self.answered.replace(at);
        let long = |before: &Instant| at.saturating_duration_since(*before) > SILENCE;
        self.silences.extend(before.filter(long).map(|before| (before, at)));
    }

    /// A request was lost, and why.
    fn lost_for(&mut self, reason: String) {
        let known = self.reasons.contains_key(&reason) || self.reasons.len() < REASONS_MAX;
        let reason = if known { reason } else { "other reasons".to_owned() };
        *self.reasons.entry(reason).or_default() += 1;
    }

    /// `floor` is the highest counter that was known when the request was sent.
    fn answer(&mut self, latency_ms: f64, counter: u64, floor: u64) {
        self.latencies_ms.push(latency_ms);
        if counter <= floor || !self.seen.insert(counter) {
            self.counter_faults += 1;
        }
        self.highest = self.highest.max(counter);
        // A request lives for a second: below this nothing can come any more but a fault.
        while self.seen.len() > 4096 {
            self.seen.pop_first();
        }
    }

    fn report(&self, lost: u64) -> LoadReport {
        let mut sorted = self.latencies_ms.clone();
        sorted.sort_by(f64::total_cmp);
        let quantile = |q: f64| {
            let index = (sorted.len().saturating_sub(1) as f64 * q).round() as usize;
            sorted.get(index).copied().unwrap_or(f64::NAN)
        };
        let mut histogram = Vec::new();
        for latency_ms in &sorted {
            let place = latency_ms.max(0.5).log2().floor() as usize + 1;
            let place = if *latency_ms < 1.0 { 0 } else { place };
            histogram.resize(histogram.len().max(place + 1), 0);
            histogram[place] += 1;
        }
        let lengths = self.silences.iter().map(|(from, to)| *to - *from);
        // One that was due just before may have reached a guest that stood already.
        let explained = |due| {
            self.silences
                .iter()
                .any(|(from, to)| *from <= due + SILENCE && due <= *to)
        };
        LoadReport {
            sent: self.sent,
            lost,
            counter_faults: self.counter_faults,
            p50_ms: quantile(0.5),
            p99_ms: quantile(0.99),
            max_ms: quantile(1.0),
            silence_ms: lengths.max().unwrap_or_default().as_secs_f64() * 1e3,
            lost_in_between: self.lost.iter().filter(|due| !explained(**due)).count() as u64,
            reasons: self.reasons.clone(),
            histogram,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_that_stands_or_falls_is_a_fault_and_reordered_answers_are_not() {
        let mut tally = Tally::default();
        tally.answer(1.0, 7, 5);
        tally.answer(1.0, 6, 5);
        assert_eq!(tally.counter_faults, 0);
        tally.answer(1.0, 7, 5);
        assert_eq!(tally.counter_faults, 1, "the same value twice");
        tally.answer(1.0, 4, 7);
        assert_eq!(tally.counter_faults, 2, "a value from the past");
    }

    #[test]
    fn the_histogram_and_quantiles_hold_every_answer() {
        let mut tally = Tally::default();
        for (counter, latency) in [0.5, 1.0, 3.0, 900.0].into_iter().enumerate() {
            tally.answer(latency, counter as u64 + 1, 0);
        }
        let report = tally.report(2);
        assert_eq!(report.histogram.iter().sum::<u64>(), 4);
        assert_eq!(
            (report.histogram[0], report.histogram[1], report.histogram[2]),
            (1, 1, 1)
        );
        assert_eq!((report.max_ms, report.lost), (900.0, 2));
    }

    #[test]
    fn only_where_the_guest_stands_may_requests_be_lost_and_then_only_those_due_in_a_standstill() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut tally = Tally::default();
        [0, 20, 3020, 3040, 4040].into_iter().for_each(|ms| tally.heard(at(ms)));
        assert!(tally.report(0).holds(false).is_ok());
        tally.lost.extend([at(10), at(2000), at(3500)]);
        let report = tally.report(3);
        assert!((report.silence_ms - 3000.0).abs() < 1.0);
        assert!(report.holds(false).is_err() && report.holds(true).is_ok());
        tally.lost.push(at(4200));
        assert!(tally.report(4).holds(true).is_err());
        let faulty = LoadReport {
            counter_faults: 1,
            ..report
        };
        assert!(faulty.holds(true).is_err());
    }

    #[test]
    fn a_guest_that_is_not_there_loses_every_request() {
        let load = Load::start(Path::new("/proc/self/ns/net"), Ipv4Addr::new(127, 9, 9, 9), 50).unwrap();
        let end = std::time::Instant::now() + Duration::from_secs(30);
        while load.lost() < 2 {
            assert!(std::time::Instant::now() < end, "nothing is lost");
            thread::yield_now();
        }
        let report = load.finish().unwrap();
        assert!(report.sent >= 2, "{report:?}");
        assert_eq!(report.lost, report.sent);
        assert_eq!(report.reasons.values().sum::<u64>(), report.lost, "{report:?}");
    }

    #[test]
    fn every_lost_request_is_counted_whatever_the_reason() {
        let mut tally = Tally::default();
        for n in 0..100 {
            tally.lost_for(format!("reason {}", n % (REASONS_MAX + 5)));
        }
        assert_eq!(tally.reasons.len(), REASONS_MAX + 1);
        assert_eq!(tally.reasons.values().sum::<u64>(), 100);
    }
}
