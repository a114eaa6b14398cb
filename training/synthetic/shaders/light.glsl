// Light on a surface: a key light with shadows, a fill light, a back light, and light from all around.

uniform vec3 eye, sky, ground;
uniform vec3 lights[6];    // direction and colour of each
uniform float softness;    // of shadows, 0 to 1
uniform sampler2DShadow shadows;
uniform mat4 lamp;         // from points to the shadow map

struct Surface {
    vec3 colour;
    vec3 bleed;   // colour of subsurface scattering
    float gloss;  // sharpness of reflections, 0 to 1
    float shine;  // strength of reflections
    float wrap;   // wrap of diffuse light into the shade
    float alpha;
    float dim;    // share of all light that arrives
    float key;    // share of the key light that arrives
};

float key_arrives(vec3 point, vec3 normal) {  // 0 in full shadow, 1 outside
    vec3 p = (lamp * vec4(point + normal * .03, 1)).xyz * .5 + .5;
    p.z -= .004;
    float r = mix(.0022, .009, softness);
    float sum = texture(shadows, p + vec3(0, r, 0)) + texture(shadows, p + vec3(.87 * r, -.5 * r, 0))
        + texture(shadows, p + vec3(-.87 * r, -.5 * r, 0));
    return mix(sum / 3., 1., .15 + .25 * softness);
}

float fifth(float x) {
    float square = x * x;
    return square * square * x;
}

vec3 surroundings(vec3 normal) {
    return mix(ground, sky, normal.y * .5 + .5);
}

vec3 lit(Surface s, vec3 normal, vec3 view) {
    vec3 sum = vec3(0);
    float grey = s.bleed == vec3(0) ? 0. : .25;
    float sharp = mix(8., 160., s.gloss * s.gloss);
    for (int i = 0; i < 3; i++) {
        vec3 light = lights[2 * i];
        float facing = dot(normal, light), direct = max(0., facing);
        float wrapped = max(0., (facing + s.wrap) / (1. + s.wrap));
        wrapped *= wrapped * .35 + .65;
        vec3 reflected = s.colour * (direct + (wrapped - direct) * (s.bleed * 1.3 + grey));
        if (i < 2) {
            vec3 halfway = normalize(light + view);
            float gleam = exp2(sharp * 1.4427 * (dot(normal, halfway) - 1.)) * (sharp + 8.) / 25. * s.shine * .25;
            reflected += gleam * (.04 + .96 * fifth(1. - max(0., dot(halfway, view)))) * 8. * step(0., facing);
        }
        if (i == 0) reflected *= mix(s.bleed * .12, vec3(1), s.key);
        sum += reflected * lights[2 * i + 1];
    }
    sum += s.colour * surroundings(normal) * mix(.45, 1., smoothstep(-.9, .4, normal.y + .55));
    float edge = 1. - max(0., dot(normal, view));
    return (sum + s.colour * edge * edge * edge * sky) * s.dim;
}

vec3 developed(vec3 sum) {  // linear light to a picture's colours
    sum = clamp(sum / (sum * .22 + .82), 0., 1.);  // bright parts saturate softly
    // The sRGB curve without powers. Source: Ian Taylor, 2008.
    vec3 a = sqrt(sum), b = sqrt(a), c = sqrt(b);
    return clamp(.662002687 * a + .684122060 * b - .323583601 * c - .0225411470 * sum, 0., 1.);
}
