//! Sizes and times, as people write and read them.

use model::Timestamp;
use time::{OffsetDateTime, macros::format_description};

const UNITS: [(&str, u64); 5] = [("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10), ("", 1)];

/// Bytes of `512M`, `2G`, `1T`, `64K`, in powers of 1024; `iB` or `B` may follow. A plain number is in units of `plain` bytes.
fn size(text: &str, plain: u64) -> Result<u64, String> {
    let wrong = || "give a size such as 512M, 2G or 1T".to_owned();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let factor = if unit.is_empty() {
        plain
    } else {
        let unit = unit
            .strip_suffix("iB")
            .or_else(|| unit.strip_suffix('B'))
            .unwrap_or(unit);
        let known = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit));
        known.map(|(_, factor)| *factor).ok_or_else(wrong)?
    };
    number
        .checked_mul(factor)
        .ok_or_else(|| "the size is too large".to_owned())
}

/// A disk's size in bytes; a plain number is bytes.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    size(text, 1)
}

/// A memory's size in MiB; a plain number is MiB.
pub(crate) fn mebibytes(text: &str) -> Result<u64, String> {
    let bytes = size(text, 1 << 20)?;
    if bytes % (1 << 20) == 0 {
        Ok(bytes >> 20)
    } else {
        Err("memory comes in whole MiB".to_owned())
    }
}

/// Bytes for people: `1.5 GiB`.
pub(crate) fn show_bytes(bytes: u64) -> String {
    match UNITS.iter().find(|(_, factor)| bytes >= *factor && *factor > 1) {
        Some((unit, factor)) => format!("{:.1} {unit}iB", bytes as f64 / *factor as f64),
        None => format!("{bytes} B"),
    }
}

/// MiB for people.
pub(crate) fn show_mebibytes(mib: u64) -> String {
    show_bytes(mib.saturating_mul(1 << 20))
}

/// A moment in UTC: `2026-11-20 14:05:09Z`.
pub(crate) fn show_time(at: Timestamp) -> String {
    let form = format_description!("[year]-[month]-[day] [hour]:[minute]:[second]Z");
    let moment = OffsetDateTime::from_unix_timestamp_nanos(i128::from(at.0) * 1_000_000).ok();
    moment
        .and_then(|moment| moment.format(form).ok())
        .unwrap_or_else(|| "never".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them_and_nothing_else_is() {
        assert_eq!(mebibytes("512M"), Ok(512));
        assert_eq!(mebibytes("512"), Ok(512));
        assert_eq!(mebibytes("2GiB"), Ok(2048));
        assert_eq!(bytes("10g"), Ok(10 << 30));
        assert_eq!(bytes("4096B"), Ok(4096));
        for bad in [
            "",
            "-1",
            "1.5G",
            "G",
            "512X",
            "1e3",
            "99999999999999T",
            "18446744073709551616",
            " 1",
            "１",
        ] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
        assert!(mebibytes("1500K").is_err());
    }

    #[test]
    fn sizes_and_times_are_shown_in_one_form() {
        assert_eq!(show_bytes(512), "512 B");
        assert_eq!(show_bytes(1536 << 20), "1.5 GiB");
        assert_eq!(show_time(Timestamp(0)), "1970-01-01 00:00:00Z");
        assert_eq!(show_time(Timestamp(i64::MAX)), "never");
    }
}
