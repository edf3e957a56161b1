//! `godwit events`: what happened and what happens, as the cell tells it.

use std::time::Instant;

use clap::Args;
use model::{Notice, event};
use serde_json::{Value, json};

use super::Session;
use crate::{
    client::sse::Event,
    exit::{Exit, Failure},
    follow::{AWAY_MAX, AWAY_PAUSE},
    out::{self, Format, safe, units},
};

/// Events that are shown when not all are kept any more.
const NEWEST: u64 = 1000;

/// What happens, as it happens.
#[derive(Args, Debug)]
pub(crate) struct Events {
    /// Go on with what happens from now on, until interrupted
    #[arg(long, short)]
    follow: bool,
    /// Begin after the event with this number; without it, all that are kept, or with --follow none
    #[arg(long, value_name = "NUMBER")]
    after: Option<u64>,
}

impl Events {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        let from = if self.follow {
            self.after
        } else {
            Some(self.after.unwrap_or(0))
        };
        let Some(at) = self
            .print(session, from)
            .await?
            .filter(|_| !self.follow && self.after.is_none())
        else {
            return Ok(());
        };
        // The oldest are gone: those that are kept for certain.
        self.print(session, Some(at.saturating_sub(NEWEST))).await.map(|_| ())
    }

    /// Prints events as they come. The position of a gap where nothing else came.
    async fn print(&self, session: &Session, mut after: Option<u64>) -> Result<Option<u64>, Failure> {
        let mut away: Option<Instant> = None;
        loop {
            let mut events = match session.client.events(after, self.follow).await {
                Ok(events) => events,
                // A server that restarts is waited for, once it was there.
                Err(failure) if failure.may_pass() && away.is_some_and(|since| since.elapsed() < AWAY_MAX) => {
                    tokio::time::sleep(AWAY_PAUSE).await;
                    continue;
                }
                Err(failure) => return Err(failure),
            };
            let mut gap = None;
            loop {
                let event = match events.next().await {
                    Ok(Some(event)) => event,
                    Ok(None) if !self.follow => return Ok(gap),
                    Err(failure) if !self.follow => return Err(failure),
                    // Go on after the last one seen.
                    Ok(None) | Err(_) => {
                        away = Some(Instant::now());
                        break;
                    }
                };
                after = event.id.as_ref().and_then(|id| id.parse().ok()).or(after);
                if event.name == "lagged" {
                    gap = after;
                    if self.follow || self.after.is_some() {
                        out::note("some events are no longer kept: the list has a gap here");
                    }
                    continue;
                }
                print(session.format, &event)?;
            }
        }
    }
}

fn print(format: Format, event: &Event) -> Result<(), Failure> {
    let data: Value = serde_json::from_str(&event.data)
        .map_err(|error| Failure::new(Exit::Unreachable, format!("an event is no JSON: {error}")))?;
    match format {
        // One line each, so that a program reads them as they come.
        Format::Json => out::line(&safe::json(&json!({ "event": event.name, "data": data }).to_string())),
        Format::Yaml => {
            out::line("---")?;
            out::data(format, &json!({ "event": event.name, "data": data }))
        }
        Format::Table | Format::Wide if event.name == "notice" => {
            let notice: Notice = out::read(&data)?;
            out::line(&line(&notice))
        }
        // Progress is for live lines.
        Format::Table | Format::Wide => Ok(()),
    }
}

fn line(notice: &event::Notice) -> String {
    let kind = match notice.kind {
        model::operation::TargetKind::Vm => "vm",
        model::operation::TargetKind::Template => "template",
        model::operation::TargetKind::Host => "host",
    };
    let Notice {
        sequence,
        what,
        name,
        detail,
        ..
    } = notice;
    let text = format!(
        "{sequence:>6}  {}  {what:<22}  {kind} {name}  {detail}",
        units::show_time(notice.at)
    );
    safe::text(text.trim_end())
}
