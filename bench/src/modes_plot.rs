//! The picture of `modes`: three panels of grouped bars, one group for each load, one colour for each mode.
//!
//! Invariants: the same colour means the same mode in all panels; a bar without a value is not drawn; text is left to
//! the viewer's sans-serif font, so no font is needed here.
//!
//! Does not choose what is shown: every row is a bar.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::modes::Row;

const PANEL_PX: u32 = 330;
const LEGEND_PX: u32 = 56;
/// The least width of a bar.
const BAR_PX: usize = 22;
const MARGIN_PX: usize = 140;
/// Left of the axes' titles.
const LEFT_PX: u32 = 16;
/// For an axis' title and its numbers.
const LABELS_PX: u32 = 78;
/// Part of a group's width that its bars take.
const FILLED: f64 = 0.84;
/// Not replicated, COLO, and Remus from short to long intervals; told apart by all kinds of sight, and in grey.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0x8c, 0x8c, 0x8c),
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xf6, 0xc7, 0x44),
    RGBColor(0xe6, 0x8a, 0x2e),
    RGBColor(0xc4, 0x4e, 0x1a),
    RGBColor(0x80, 0x26, 0x10),
    RGBColor(0x40, 0x10, 0x08),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// One panel.
struct Panel {
    title: &'static str,
    axis: &'static str,
    /// Where the bar ends.
    value: fn(&Row) -> Option<f64>,
    /// Where a whisker above it ends.
    whisker: Option<fn(&Row) -> f64>,
}

const PANELS: [Panel; 3] = [
    Panel {
        title: "Throughput of the service; not replicated = 100 %",
        axis: "percent, log",
        value: |row| row.ratio.map(|ratio| ratio * 100.0),
        whisker: None,
    },
    Panel {
        title: "Latency: bar to the median, whisker to the 99th percentile",
        axis: "milliseconds, log",
        value: |row| Some(row.p50_us / 1e3),
        whisker: Some(|row| row.p99_us / 1e3),
    },
    Panel {
        title: "Traffic between the hosts, both directions",
        axis: "MB/s, log",
        value: |row| row.link_bytes_per_s.map(|bytes| bytes / 1e6),
        whisker: None,
    },
];

/// An SVG document of all rows; the rows of a load follow each other.
pub(crate) fn draw(rows: &[Row]) -> Result<String, String> {
    let modes = distinct(rows.iter().map(|row| row.mode.as_str()));
    let loads = distinct(rows.iter().map(|row| row.load.as_str()));
    let width = MARGIN_PX + loads.len() * modes.len().max(4) * BAR_PX;
    let height = LEGEND_PX + PANEL_PX * PANELS.len() as u32;
    let mut svg = String::new();
    {
        let size = (width.max(720) as u32, height);
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        draw_all(&root, rows, &modes, &loads)
            .map_err(|error| format!("draw the picture: {error}"))?;
    }
    Ok(svg)
}

type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

fn draw_all(root: &Area<'_>, rows: &[Row], modes: &[&str], loads: &[&str]) -> Drawn {
    root.fill(&WHITE)?;
    legend(root, modes)?;
    let (_, panels) = root.split_vertically(LEGEND_PX);
    let areas = panels.split_evenly((PANELS.len(), 1));
    for (panel, area) in PANELS.iter().zip(&areas) {
        draw_panel(root, area, panel, rows, modes, loads)?;
    }
    root.present()
}

fn legend(root: &Area<'_>, modes: &[&str]) -> Drawn {
    let mut x = (LEFT_PX + LABELS_PX) as i32;
    for (index, mode) in modes.iter().enumerate() {
        let name = mode_name(mode);
        root.draw(&Rectangle::new(
            [(x, 20), (x + 14, 34)],
            colour(index).filled(),
        ))?;
        root.draw_text(&name, &text(14, HPos::Left, VPos::Center), (x + 20, 27))?;
        x += 36 + 7 * name.len() as i32;
    }
    Ok(())
}

fn draw_panel(
    root: &Area<'_>,
    area: &Area<'_>,
    panel: &Panel,
    rows: &[Row],
    modes: &[&str],
    loads: &[&str],
) -> Drawn {
    let (low, high) = bounds(panel, rows);
    let mut chart = ChartBuilder::on(area)
        .caption(panel.title, ("sans-serif", 17))
        .margin_left(LEFT_PX)
        .margin_right(16)
        .y_label_area_size(LABELS_PX)
        .x_label_area_size(46)
        .build_cartesian_2d(0.0..loads.len().max(1) as f64, (low..high).log_scale())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(0)
        .y_desc(panel.axis)
        .y_label_formatter(&|value| format!("{value}"))
        .y_label_style(("sans-serif", 14))
        .axis_desc_style(("sans-serif", 14))
        .bold_line_style(RGBColor(0xc8, 0xc8, 0xc8))
        .light_line_style(RGBColor(0xee, 0xee, 0xee))
        .draw()?;
    for row in rows {
        let find = |names: &[&str], name: &str| names.iter().position(|n| *n == name);
        let (Some(group), Some(bar)) = (find(loads, &row.load), find(modes, &row.mode)) else {
            continue;
        };
        let Some(value) = (panel.value)(row).filter(|&value| value > 0.0) else {
            continue;
        };
        let width = FILLED / modes.len() as f64;
        let left = group as f64 + (1.0 - FILLED) / 2.0 + bar as f64 * width;
        let corners = [(left, low), (left + width * 0.9, value)];
        chart.draw_series([Rectangle::new(corners, colour(bar).filled())])?;
        if let Some(whisker) = panel.whisker {
            let (middle, end) = (left + width * 0.45, whisker(row).max(value));
            let cap = |y| [(left + width * 0.2, y), (left + width * 0.7, y)];
            let lines = [vec![(middle, value), (middle, end)], cap(end).to_vec()];
            chart.draw_series(lines.map(|line| PathElement::new(line, BLACK.stroke_width(1))))?;
        }
    }
    for (group, load) in loads.iter().enumerate() {
        let (x, y) = chart.backend_coord(&(group as f64 + 0.5, low));
        root.draw_text(load, &text(14, HPos::Center, VPos::Top), (x, y + 8))?;
        let base = rows.iter().find(|row| row.load == **load);
        if let Some(base) =
            base.filter(|_| panel.whisker.is_none() && panel.axis.starts_with("per"))
        {
            let rate = format!("100 % = {:.0}/s", base.per_second);
            root.draw_text(&rate, &text(12, HPos::Center, VPos::Top), (x, y + 27))?;
        }
    }
    Ok(())
}

/// Powers of ten around everything that is drawn.
fn bounds(panel: &Panel, rows: &[Row]) -> (f64, f64) {
    let ends = rows.iter().flat_map(|row| {
        let value = (panel.value)(row);
        [
            value,
            panel
                .whisker
                .and(value)
                .and_then(|_| Some((panel.whisker?)(row))),
        ]
    });
    let ends = ends.flatten().filter(|end| end.is_finite() && *end > 0.0);
    let (low, high) = ends.fold((f64::MAX, f64::MIN), |(low, high), end| {
        (low.min(end), high.max(end))
    });
    if low > high {
        return (1.0, 10.0);
    }
    // A bar that ends on the axis is none.
    let below = 10_f64.powf((low * 0.8).log10().floor());
    let above = 10_f64.powf(high.log10().ceil());
    (below, above.max(below * 10.0))
}

fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    names.fold(Vec::new(), |mut seen, name| {
        if !seen.contains(&name) {
            seen.push(name);
        }
        seen
    })
}

fn mode_name(mode: &str) -> String {
    match (mode, mode.strip_prefix("remus-")) {
        ("run", _) => "not replicated".to_owned(),
        ("colo", _) => "COLO".to_owned(),
        (_, Some(interval_ms)) => format!("Remus, {interval_ms} ms"),
        _ => mode.to_owned(),
    }
}

fn colour(index: usize) -> RGBColor {
    COLOURS[index.min(COLOURS.len() - 1)]
}

fn text(size: u32, horizontal: HPos, vertical: VPos) -> TextStyle<'static> {
    ("sans-serif", size)
        .into_text_style(&(1, 1))
        .pos(Pos::new(horizontal, vertical))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::modes::Row;

    #[test]
    fn every_row_with_a_value_is_a_bar_in_the_colour_of_its_mode() {
        let rows = [
            Row::of("run", "page & more", 1000.0, Some(1.0), None),
            Row::of("colo", "page & more", 600.0, Some(0.6), Some(1e6)),
            Row::of("remus-25", "page & more", 60.0, Some(0.06), Some(2e6)),
        ];
        let svg = draw(&rows).unwrap();
        // One in the legend, one for throughput, one for latency, and for a pair one for the link.
        for (index, bars) in [(0, 3), (1, 4), (2, 4)] {
            let RGBColor(red, green, blue) = COLOURS[index];
            let fill = format!("fill=\"#{red:02X}{green:02X}{blue:02X}\"");
            assert_eq!(svg.matches(&fill).count(), bars, "{fill} in\n{svg}");
        }
        for part in [
            "not replicated",
            "COLO",
            "Remus, 25 ms",
            "page &amp; more",
            "MB/s",
        ] {
            assert!(svg.contains(part), "{part} is not in\n{svg}");
        }
    }

    #[test]
    fn axis_titles_keep_away_from_the_edge() {
        let svg = draw(&[Row::of("run", "page", 1000.0, Some(1.0), None)]).unwrap();
        for panel in &PANELS {
            let (before, _) = svg.split_once(&format!("\n{}\n", panel.axis)).unwrap();
            let (_, element) = before.rsplit_once("<text x=\"").unwrap();
            let x: u32 = element.split('"').next().unwrap().parse().unwrap();
            assert!(x >= LEFT_PX, "{} at {x}", panel.axis);
        }
    }

    #[test]
    fn bounds_are_powers_of_ten_around_bars_and_whiskers() {
        let mut row = Row::of("run", "page", 1000.0, Some(1.0), None);
        (row.p50_us, row.p99_us) = (200.0, 30_000.0);
        assert_eq!(bounds(&PANELS[1], &[row]), (0.1, 100.0));
        assert_eq!(bounds(&PANELS[1], &[]), (1.0, 10.0));
    }
}
