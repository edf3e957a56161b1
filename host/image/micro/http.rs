//! HTTP/1.1 on port 80: one thread a connection, keep-alive, bounded.
//!
//! | request | answer |
//! |---|---|
//! | `GET /` | a page with the name and the uptime |
//! | `GET /status` | JSON: name, uptime, ticks, largest gap, counter, memory writer, disk |
//! | `POST /gap/reset` | forgets the largest gap |
//! | `GET /download?mib=N&seed=S` (or `kib=N`) | the stream of `S`; the last 8 bytes are the checksum of all before, little-endian |
//! | `POST /memory?mib=N&rate_mib_s=R` | starts, changes or (`mib=0`) stops the memory writer |
//! | `POST /disk/write?mib=N&seed=S` | writes and syncs the disk |
//! | `GET /disk/check` | reads the disk back and compares |
//! | `POST /power?action=off\|reboot\|panic` | does so |

use crate::stream::{Checksum, Words};
use crate::{Guest, power};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const CONNECTIONS_MAX: usize = 128;
const HEAD_BYTES_MAX: u64 = 8 << 10;
const BODY_BYTES_MAX: u64 = 64 << 10;
const DOWNLOAD_BYTES_MAX: u64 = 64 << 30;
const CHUNK: usize = 64 << 10;
/// An idle or stuck connection is dropped after this; longer than any migration holds a packet back.
const SILENCE_MAX: Duration = Duration::from_secs(120);

const BAD_REQUEST: &[u8] = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

/// One parsed request.
struct Request {
    method: String,
    path: String,
    query: String,
    keep_alive: bool,
}

/// What to send back.
enum Answer {
    Text {
        status: &'static str,
        kind: &'static str,
        body: String,
    },
    Download {
        bytes: u64,
        seed: u64,
    },
    /// Says yes, then does the power action.
    Power(String),
}

/// Serves for ever.
///
/// # Errors
/// When the port cannot be listened on.
pub(crate) fn serve(guest: &Arc<Guest>) -> io::Result<()> {
    let listener = TcpListener::bind("0.0.0.0:80")?;
    println!("godwit-micro: {} serves on port 80", guest.name);
    let open = Arc::new(AtomicUsize::new(0));
    for connection in listener.incoming() {
        let Ok(mut connection) = connection else { continue };
        if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
            open.fetch_sub(1, Ordering::Relaxed);
            let _ = connection
                .write_all(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            continue;
        }
        let (guest, counted) = (Arc::clone(guest), Arc::clone(&open));
        let spawned = std::thread::Builder::new().stack_size(128 << 10).spawn(move || {
            // A client that went away mid-answer is its own business.
            let _ = converse(&guest, &connection);
            counted.fetch_sub(1, Ordering::Relaxed);
        });
        if spawned.is_err() {
            open.fetch_sub(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Answers the requests of one connection until it closes.
fn converse(guest: &Guest, connection: &TcpStream) -> io::Result<()> {
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(SILENCE_MAX))?;
    connection.set_write_timeout(Some(SILENCE_MAX))?;
    let mut reader = BufReader::new(connection);
    loop {
        let request = match read_request(&mut reader) {
            Ok(Some(request)) => request,
            Ok(None) => break,
            Err(error) => {
                let _ = (&mut &*connection).write_all(BAD_REQUEST);
                return Err(error);
            }
        };
        let answer = route(guest, &request);
        send(guest, connection, &request, answer)?;
        if !request.keep_alive {
            break;
        }
    }
    Ok(())
}

/// Reads one request, its body thrown away; `None` when the client closed.
fn read_request(reader: &mut BufReader<&TcpStream>) -> io::Result<Option<Request>> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_string());
    let mut head = reader.by_ref().take(HEAD_BYTES_MAX);
    let mut line = String::new();
    if head.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (Some(method), Some(target), Some(version)) = (words.next(), words.next(), words.next()) else {
        return Err(bad("request line"));
    };
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut request = Request {
        method: method.to_string(),
        path: path.to_string(),
        query: query.to_string(),
        keep_alive: version == "HTTP/1.1",
    };
    let mut body_bytes = 0;
    loop {
        let mut line = String::new();
        if head.read_line(&mut line)? == 0 {
            return Err(bad("the head is too long or cut off"));
        }
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            body_bytes = value.parse().map_err(|_| bad("content-length"))?;
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(bad("transfer-encoding is not supported"));
        } else if name.eq_ignore_ascii_case("connection") {
            request.keep_alive = !value.eq_ignore_ascii_case("close");
        }
    }
    if body_bytes > BODY_BYTES_MAX {
        return Err(bad("body too large"));
    }
    io::copy(&mut reader.by_ref().take(body_bytes), &mut io::sink())?;
    Ok(Some(request))
}

/// Decides the answer; slow work on memory and disk is done here.
fn route(guest: &Guest, request: &Request) -> Answer {
    let number = |key: &str| parameter(&request.query, key);
    match (request.method.as_str(), request.path.as_str()) {
        ("GET", "/") => page(guest),
        ("GET", "/status") => json(Ok(guest.status())),
        ("POST", "/gap/reset") => {
            guest.ticks.reset();
            json(Ok("{}\n".into()))
        }
        ("GET", "/download") => download(number("mib"), number("kib"), number("seed")),
        ("POST", "/memory") => json(both(number("mib"), number("rate_mib_s")).and_then(|(mib, rate)| {
            guest.memory.set(
                mib.ok_or("mib is missing: the working set in MiB, 0 to stop")?,
                rate.unwrap_or(0),
            )?;
            Ok(guest.memory.status() + "\n")
        })),
        ("POST", "/disk/write") => json(
            both(number("mib"), number("seed"))
                .and_then(|(mib, seed)| crate::lock(&guest.disk).write(mib.unwrap_or(8), seed.unwrap_or(0))),
        ),
        ("GET", "/disk/check") => json(crate::lock(&guest.disk).check()),
        ("POST", "/power") => match request.query.strip_prefix("action=") {
            Some(action @ ("off" | "reboot" | "panic")) => Answer::Power(action.to_string()),
            _ => json(Err("action must be off, reboot or panic".into())),
        },
        _ => Answer::Text {
            status: "404 Not Found",
            kind: "text/plain",
            body: "no such page\n".into(),
        },
    }
}

fn page(guest: &Guest) -> Answer {
    let seconds = guest.started.elapsed().as_secs();
    let (name, counter) = (&guest.name, guest.count());
    let body = format!(
        "<!doctype html><title>{name}</title><h1>{name}</h1><p>A Godwit micro guest, up for {seconds} s. Answer {counter}.</p>\n"
    );
    Answer::Text {
        status: "200 OK",
        kind: "text/html; charset=utf-8",
        body,
    }
}

/// A JSON answer, or 400 with the reason.
fn json(result: Result<String, String>) -> Answer {
    match result {
        Ok(body) => Answer::Text {
            status: "200 OK",
            kind: "application/json",
            body,
        },
        Err(reason) => Answer::Text {
            status: "400 Bad Request",
            kind: "text/plain",
            body: reason + "\n",
        },
    }
}

fn download(
    mib: Result<Option<u64>, String>,
    kib: Result<Option<u64>, String>,
    seed: Result<Option<u64>, String>,
) -> Answer {
    let parsed = both(mib, kib).and_then(|sizes| Ok((sizes, seed?)));
    let ((mib, kib), seed) = match parsed {
        Ok(parsed) => parsed,
        Err(reason) => return json(Err(reason)),
    };
    let bytes = match (mib, kib) {
        (Some(mib), None) => mib.saturating_mul(1 << 20),
        (None, Some(kib)) => kib.saturating_mul(1 << 10),
        (None, None) => 1 << 20,
        (Some(_), Some(_)) => 0,
    };
    if bytes == 0 || bytes > DOWNLOAD_BYTES_MAX {
        return json(Err("give mib or kib, not both, from 1 KiB to 64 GiB".into()));
    }
    Answer::Download {
        bytes,
        seed: seed.unwrap_or(0),
    }
}

/// The number that `key` has in `query`, `None` when it is absent.
fn parameter(query: &str, key: &str) -> Result<Option<u64>, String> {
    let found = query
        .split('&')
        .find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='));
    let parse = |text: &str| {
        text.parse()
            .map_err(|_| format!("{key} must be a whole number from 0 to 2^64-1"))
    };
    found.map(parse).transpose()
}

fn both<A, B>(a: Result<A, String>, b: Result<B, String>) -> Result<(A, B), String> {
    Ok((a?, b?))
}

fn send(guest: &Guest, mut connection: &TcpStream, request: &Request, answer: Answer) -> io::Result<()> {
    let close = if request.keep_alive { "keep-alive" } else { "close" };
    let head = |status: &str, kind: &str, bytes: u64| {
        let name = &guest.name;
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {bytes}\r\nConnection: {close}\r\nServer: godwit-micro/{name}\r\n\r\n"
        )
    };
    match answer {
        Answer::Text { status, kind, body } => {
            connection.write_all((head(status, kind, body.len() as u64) + &body).as_bytes())
        }
        Answer::Download { bytes, seed } => {
            connection.write_all(head("200 OK", "application/octet-stream", bytes).as_bytes())?;
            stream_out(connection, bytes, seed)
        }
        Answer::Power(action) => {
            connection.write_all((head("200 OK", "application/json", 3) + "{}\n").as_bytes())?;
            // Lets the answer leave before the machine does: closes our side and waits for the client's close.
            connection.shutdown(std::net::Shutdown::Write)?;
            connection.set_read_timeout(Some(Duration::from_secs(1)))?;
            let _ = io::copy(&mut connection.take(BODY_BYTES_MAX), &mut io::sink());
            power::act(&action);
            Ok(())
        }
    }
}

/// Sends `bytes` bytes: the stream of `seed` and, in the last 8, its checksum.
fn stream_out(mut connection: &TcpStream, bytes: u64, seed: u64) -> io::Result<()> {
    let (mut words, mut checksum) = (Words::new(seed), Checksum::default());
    let mut chunk = vec![0; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let length = left.min(CHUNK as u64) as usize;
        let last = left == length as u64;
        let data = if last { length - 8 } else { length };
        words.fill(&mut chunk[..data]);
        checksum.update(&chunk[..data]);
        if last {
            chunk[data..length].copy_from_slice(&checksum.value().to_le_bytes());
        }
        connection.write_all(&chunk[..length])?;
        left -= length as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_is_found_by_its_whole_name_and_must_be_a_number() {
        assert_eq!(parameter("mib=3&seed=4", "seed"), Ok(Some(4)));
        assert_eq!(parameter("amib=3", "mib"), Ok(None));
        assert!(parameter("mib=-1", "mib").is_err());
        assert!(parameter("mib=18446744073709551616", "mib").is_err());
    }

    #[test]
    fn a_download_has_a_size_within_bounds() {
        assert!(matches!(
            download(Ok(Some(2)), Ok(None), Ok(None)),
            Answer::Download {
                bytes: 2_097_152,
                seed: 0
            }
        ));
        assert!(matches!(
            download(Ok(Some(u64::MAX)), Ok(None), Ok(None)),
            Answer::Text { .. }
        ));
        assert!(matches!(
            download(Ok(Some(1)), Ok(Some(1)), Ok(None)),
            Answer::Text { .. }
        ));
    }
}
