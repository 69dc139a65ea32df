-- What every page needs and Markdown cannot say. Quarto applies it (`filters`), and so does the preview.
-- Pictures load when they come near; tables and displayed formulas scroll in a box that the keyboard reaches, and the
-- columns of a table are as wide as what they hold, not as the dashes of its Markdown.

function Image(image)
  image.attributes.loading = "lazy"
  return image
end

-- The name of each column on its cells, for the style sheet to show where a phone has no room for rows.
local function name_cells(body, names)
  for _, row in ipairs(body) do
    for i, cell in ipairs(row.cells) do cell.attr.attributes["data-label"] = names[i] end
  end
end

-- An interval stays on one line, and so does n with its number.
local function unbroken(inlines)
  for i = 2, #inlines do
    local before = inlines[i - 1].text or ""
    if inlines[i].t == "Space" and (before:match("^%[.*,$") or before == "n") then inlines[i] = pandoc.Str("\u{a0}") end
  end
  return inlines
end

function Table(table)
  table.colspecs = table.colspecs:map(function(spec) return {spec[1], nil} end)
  local names, classes = {}, {"scroll"}
  for _, row in ipairs(table.head.rows) do
    names = row.cells:map(function(cell) return pandoc.utils.stringify(cell.contents) end)
  end
  if names[2] == "claim" or names[2] == "number" then
    classes[2] = "claims"
    table = table:walk({Inlines = unbroken})
    for _, body in ipairs(table.bodies) do name_cells(body.body, names) end
  end
  return pandoc.Div({table}, pandoc.Attr("", classes, {tabindex = "0"}))
end

function Math(math)
  if math.mathtype ~= "DisplayMath" then return nil end
  return pandoc.Span({math}, pandoc.Attr("", {"formula"}, {tabindex = "0"}))
end
