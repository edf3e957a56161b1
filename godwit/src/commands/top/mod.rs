//! `godwit top`: what VMs and hosts use, as it changes; or once, as a table.
//!
//! ```text
//!   /v1/metrics ──▶ board: what was read, its order and filter ──▶ draw ──▶ the terminal
//!                     ▲ keys
//! ```

mod board;
mod draw;

use std::{io::IsTerminal as _, time::Duration};

use clap::Args;
use model::telemetry::{HostReading, VmReading};
use ratatui::{
    DefaultTerminal,
    crossterm::event::{self, Event, KeyEventKind},
};
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};

use self::board::{Board, Seen, Sort};
use super::Session;
use crate::{
    exit::{Exit, Failure},
    out,
};

/// VMs and hosts that are read.
const ITEMS_MAX: usize = 5000;
/// Points of the past that are drawn.
const HISTORY: usize = 30;
/// Between two looks at whether anybody still reads keys.
const KEYS_EVERY: Duration = Duration::from_millis(200);
/// Keys that wait.
const KEYS_MAX: usize = 64;

/// What VMs and hosts use, as it changes.
#[derive(Args, Debug)]
pub(crate) struct Top {
    /// Print one table and end; so it is anyway where no terminal shows it
    #[arg(long)]
    once: bool,
    /// Begin with hosts, not with VMs; for cloud admins
    #[arg(long)]
    hosts: bool,
    /// What comes first
    #[arg(long, value_enum, default_value_t, value_name = "FIGURE")]
    sort: Sort,
    /// Only those whose name, host or state has this in it
    #[arg(long, default_value = "", value_name = "TEXT")]
    filter: String,
    /// Seconds between two looks
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=3600), value_name = "SECONDS")]
    every: u16,
}

impl Top {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        let mut board = Board::new(self.hosts, self.sort, self.filter.clone());
        if session.format.is_data() {
            return out::data(session.format, &items(session, self.hosts, 0).await?);
        }
        board.show(read(session, &board).await?);
        let shown = std::io::stdout().is_terminal() && std::io::stdin().is_terminal();
        if self.once || !shown {
            return out::text(&board.table());
        }
        let mut terminal = ratatui::try_init().map_err(|error| Failure::output(&error))?;
        let ended = follow(&mut terminal, session, board, Duration::from_secs(self.every.into())).await;
        ratatui::restore();
        ended
    }
}

/// Shows what is read, and does as keys say, until one of them ends it.
async fn follow(
    terminal: &mut DefaultTerminal,
    session: &Session,
    mut board: Board,
    every: Duration,
) -> Result<(), Failure> {
    let mut keys = keys();
    let mut looks = interval(every);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    looks.reset();
    loop {
        terminal
            .draw(|frame| draw::draw(frame, &mut board))
            .map_err(|error| Failure::output(&error))?;
        tokio::select! {
            event = keys.recv() => match event {
                Some(Event::Key(key)) if key.kind == KeyEventKind::Press => {
                    let of = board.is_of_hosts();
                    if board.press(key).is_break() {
                        return Ok(());
                    }
                    if board.is_of_hosts() != of {
                        look(session, &mut board).await?;
                    }
                }
                // Another size, mostly: drawn anew.
                Some(_) => {}
                None => return Ok(()),
            },
            _ = looks.tick(), if !board.is_paused() => look(session, &mut board).await?,
        }
    }
}

/// Reads anew. A server that is away is waited for; what was seen last stays.
async fn look(session: &Session, board: &mut Board) -> Result<(), Failure> {
    match read(session, board).await {
        Ok(seen) => board.show(seen),
        Err(failure) if failure.may_pass() => board.complain("the server does not answer; this is what was seen last"),
        // Hosts are not for everybody, which is no reason to end.
        Err(failure) if board.is_of_hosts() && failure.exit() == Exit::Failed => {
            board.complain("hosts are shown to cloud admins alone; v goes back to VMs");
            board.show(Seen::Hosts(vec![]));
        }
        Err(failure) => return Err(failure),
    }
    Ok(())
}

async fn read(session: &Session, board: &Board) -> Result<Seen, Failure> {
    let hosts = board.is_of_hosts();
    let items = items(session, hosts, HISTORY).await?;
    Ok(if hosts {
        Seen::Hosts(items.iter().map(out::read::<HostReading>).collect::<Result<_, _>>()?)
    } else {
        Seen::Vms(items.iter().map(out::read::<VmReading>).collect::<Result<_, _>>()?)
    })
}

async fn items(session: &Session, hosts: bool, history: usize) -> Result<Vec<serde_json::Value>, Failure> {
    let path = if hosts { "/v1/metrics/hosts" } else { "/v1/metrics/vms" };
    session
        .client
        .list(&format!("{path}?history={history}"), ITEMS_MAX)
        .await
}

/// What happens at the terminal, read on a thread of its own, which ends when nobody wants it any more.
fn keys() -> mpsc::Receiver<Event> {
    let (heard, keys) = mpsc::channel(KEYS_MAX);
    std::thread::spawn(move || {
        while !heard.is_closed() {
            match event::poll(KEYS_EVERY) {
                Ok(false) => {}
                Ok(true) => match event::read() {
                    Ok(event) => {
                        if heard.blocking_send(event).is_err() {
                            return;
                        }
                    }
                    Err(_) => return,
                },
                // The terminal is gone.
                Err(_) => return,
            }
        }
    });
    keys
}
