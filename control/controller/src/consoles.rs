//! Serial consoles: a person's bytes to a guest and back, over a connection that the guest's agent opens for it.
//!
//! ```text
//!   person ── duplex pipe ── controller ── Down::OpenConsole {id, ticket} ──▶ agent
//!                                 ◀── POST /agent/v1/console/{id}, ticket ──── agent
//!                              request body: what the guest prints; response body: what the person types
//! ```

use std::{collections::BTreeMap, sync::Mutex, time::Instant};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use model::{HostId, Refusal, refusal::Code};
use tokio::{io::DuplexStream, sync::oneshot};
use uuid::Uuid;
use wire::{Ticket, session::CONSOLE_TICKET_VALID};

/// Bytes on their way in one direction of a console.
const PIPE_BYTES: usize = 64 << 10;

/// Consoles that wait for their agent at a time.
const WAITING_MAX: usize = 256;

/// The consoles that wait for their agents.
#[derive(Debug, Default)]
pub(crate) struct Consoles {
    waiting: Mutex<BTreeMap<Uuid, Waiting>>,
}

#[derive(Debug)]
struct Waiting {
    host: HostId,
    ticket: Ticket,
    until: Instant,
    /// The agent's end of the pipe.
    agents_end: DuplexStream,
    opened: oneshot::Sender<Result<(), Refusal>>,
}

/// A console that was asked for.
pub(crate) struct Asked {
    pub(crate) id: Uuid,
    pub(crate) ticket: Ticket,
    pub(crate) persons_end: DuplexStream,
    pub(crate) opened: oneshot::Receiver<Result<(), Refusal>>,
}

impl Consoles {
    fn waiting(&self) -> std::sync::MutexGuard<'_, BTreeMap<Uuid, Waiting>> {
        self.waiting.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Notes that a console is about to be opened by this host.
    pub(crate) fn ask(&self, host: HostId) -> Result<Asked, Refusal> {
        let secret: [u8; 32] = identity::random().map_err(|error| Refusal::new(Code::Overloaded, error.to_string()))?;
        let ticket = Ticket::new(URL_SAFE_NO_PAD.encode(secret));
        let id = Uuid::now_v7();
        let (persons_end, agents_end) = tokio::io::duplex(PIPE_BYTES);
        let (tell, opened) = oneshot::channel();
        let now = Instant::now();
        let mut waiting = self.waiting();
        waiting.retain(|_, console| console.until > now && !console.opened.is_closed());
        if waiting.len() >= WAITING_MAX {
            let message = "too many consoles wait to be opened";
            return Err(Refusal::new(Code::Overloaded, message).hint("try again in a moment"));
        }
        let console = Waiting {
            host,
            ticket: ticket.clone(),
            until: now + CONSOLE_TICKET_VALID,
            agents_end,
            opened: tell,
        };
        waiting.insert(id, console);
        Ok(Asked {
            id,
            ticket,
            persons_end,
            opened,
        })
    }

    /// The agent's end, for the one who was asked and shows the ticket; once, in time. `None` does not say what was wrong.
    pub(crate) fn open(&self, id: Uuid, host: HostId, ticket: &str, now: Instant) -> Option<DuplexStream> {
        let console = self.take(id, host)?;
        // Taken out first: a wrong ticket is a used one.
        let right = identity::same_secret(console.ticket.expose().as_bytes(), ticket.as_bytes());
        if !right || now >= console.until {
            return None;
        }
        console.opened.send(Ok(())).ok()?;
        Some(console.agents_end)
    }

    /// The host cannot open it.
    pub(crate) fn refuse(&self, id: Uuid, host: HostId, reason: Refusal) {
        if let Some(console) = self.take(id, host) {
            // The person may have gone.
            let _ = console.opened.send(Err(reason));
        }
    }

    /// The host's agent is gone: consoles that wait for it will not be opened.
    pub(crate) fn gone(&self, host: HostId) {
        let mut waiting = self.waiting();
        let ids: Vec<Uuid> = waiting
            .iter()
            .filter(|(_, console)| console.host == host)
            .map(|(id, _)| *id)
            .collect();
        // Dropped, which is how the persons notice.
        ids.iter().for_each(|id| drop(waiting.remove(id)));
    }

    fn take(&self, id: Uuid, host: HostId) -> Option<Waiting> {
        let mut waiting = self.waiting();
        // Another host's guess must not use it up.
        waiting.get(&id).filter(|console| console.host == host)?;
        waiting.remove(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_opens_once_in_time_for_the_host_that_was_asked() {
        let (host, other) = (HostId(Uuid::from_u128(1)), HostId(Uuid::from_u128(2)));
        let consoles = Consoles::default();
        let now = Instant::now();
        let asked = consoles.ask(host).unwrap();
        let ticket = asked.ticket.expose();
        assert!(consoles.open(asked.id, other, ticket, now).is_none());
        assert!(consoles.open(Uuid::nil(), host, ticket, now).is_none());
        assert!(consoles.open(asked.id, host, ticket, now).is_some());
        assert!(consoles.open(asked.id, host, ticket, now).is_none());

        let asked = consoles.ask(host).unwrap();
        assert!(consoles.open(asked.id, host, "guess", now).is_none());
        assert!(consoles.open(asked.id, host, asked.ticket.expose(), now).is_none());

        let asked = consoles.ask(host).unwrap();
        let late = Instant::now() + CONSOLE_TICKET_VALID;
        assert!(consoles.open(asked.id, host, asked.ticket.expose(), late).is_none());
    }

    #[tokio::test]
    async fn a_hosts_refusal_reaches_the_person() {
        let host = HostId(Uuid::from_u128(1));
        let consoles = Consoles::default();
        let asked = consoles.ask(host).unwrap();
        let reason = Refusal::new(Code::WrongState, "the VM is off");
        consoles.refuse(asked.id, host, reason.clone());
        assert_eq!(asked.opened.await.unwrap(), Err(reason));
    }
}
